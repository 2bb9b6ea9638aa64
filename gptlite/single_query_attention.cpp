// Attention of one query: keys and values that it may see are read once, scores stay in the core's cache.
#include <ATen/Dispatch_v2.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "lanes.h"

// one head: q (D), and keys and values of D numbers whose rows lie so many numbers apart; of them it sees those
// that `seen` marks, or all if that is null; the answer goes to y (D)
template <typename T>
void attend(const T* q, const T* k, int64_t k_row, const T* v, int64_t v_row, const bool* seen,
            int64_t keys, int64_t D, T* y) {
  std::vector<float> query(q, q + D), scores(keys), sums(D);
  float largest = -std::numeric_limits<float>::infinity(), total = 0;
  for (float& x : query) x /= std::sqrt(static_cast<float>(D));
  for (int64_t j = 0; j < keys; j++)
    if (!seen || seen[j]) {
      scores[j] = dot(k + j * k_row, query.data(), D);
      largest = std::max(largest, scores[j]);
    }
  for (int64_t j = 0; j < keys; j++)
    if (!seen || seen[j]) {
      const float weight = std::exp(scores[j] - largest);
      total += weight;
      for (int64_t d = 0; d < D; d++) sums[d] += weight * static_cast<float>(v[j * v_row + d]);
    }
  for (int64_t d = 0; d < D; d++) y[d] = static_cast<T>(sums[d] / total);
}

// q (B, H, 1, D), k and v (B, H_kv, T, D), mask (1, T) or none for all keys -> (B, H, 1, D), in float32
at::Tensor single_query_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                  const std::optional<at::Tensor>& mask) {
  TORCH_CHECK_VALUE(q.dim() == 4 && q.size(2) == 1,
                    "the queries are ", q.sizes(), ", but must be (B, H, 1, D).");
  const int64_t B = q.size(0), H = q.size(1), D = q.size(3);
  TORCH_CHECK_VALUE(k.dim() == 4 && k.sizes() == v.sizes() && k.size(0) == B && k.size(3) == D,
                    "keys ", k.sizes(), " and values ", v.sizes(), " must both be (", B,
                    ", H_kv, T, ", D, ") for these queries.");
  const int64_t T = k.size(2), group = H / std::max<int64_t>(k.size(1), 1);
  TORCH_CHECK_VALUE(group * k.size(1) == H,
                    "the ", k.size(1), " heads of keys do not divide the ", H, " of the queries.");
  TORCH_CHECK_VALUE(!mask || (mask->numel() == T && mask->scalar_type() == at::kBool),
                    "the mask must be ", T, " booleans.");
  TORCH_CHECK_TYPE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                   "queries are ", q.scalar_type(), ", keys ", k.scalar_type(), ", values ",
                   v.scalar_type(), "; all must be alike.");
  const auto in_rows = [](const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); };
  const at::Tensor qs = in_rows(q), ks = in_rows(k), vs = in_rows(v);
  const at::Tensor seen = mask ? mask->contiguous() : at::Tensor();
  at::Tensor y = at::empty(q.sizes(), q.options());
  AT_DISPATCH_V2(q.scalar_type(), "single_query_attention", AT_WRAP([&] {
    const scalar_t* Q = qs.const_data_ptr<scalar_t>();
    const scalar_t *K = ks.const_data_ptr<scalar_t>(), *V = vs.const_data_ptr<scalar_t>();
    const bool* M = mask ? seen.const_data_ptr<bool>() : nullptr;
    scalar_t* Y = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / H, h = i % H, shared = h / group;  // neighbours share keys
        attend(Q + b * qs.stride(0) + h * qs.stride(1),
               K + b * ks.stride(0) + shared * ks.stride(1), ks.stride(2),
               V + b * vs.stride(0) + shared * vs.stride(1), vs.stride(2), M, T, D, Y + i * D);
      }
    });
  }), at::kFloat, at::kBFloat16);
  return y;
}

TORCH_LIBRARY_FRAGMENT(gptlite, m) {
  m.def("single_query_attention(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor");
}
TORCH_LIBRARY_IMPL(gptlite, CPU, m) { m.impl("single_query_attention", single_query_attention); }
