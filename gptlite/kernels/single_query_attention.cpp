// Attention of one query as an operator of PyTorch's; what it computes is in one_query.h.
#include <ATen/Dispatch_v2.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "one_query.h"

// q (B, H, 1, D), k and v (B, H_kv, T, D), mask (1, T) or none for all keys -> (B, H, 1, D),
// added up in float32
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
                    "the ", k.size(1), " heads of keys do not divide the ", H,
                    " of the queries.");
  TORCH_CHECK_VALUE(!mask || (mask->numel() == T && mask->scalar_type() == at::kBool),
                    "the mask must be ", T, " booleans.");
  TORCH_CHECK_TYPE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                   "queries are ", q.scalar_type(), ", keys ", k.scalar_type(), ", values ",
                   v.scalar_type(), "; all must be alike.");
  const auto in_rows = [](const at::Tensor& t) {
    return t.stride(3) == 1 ? t : t.contiguous();
  };
  const at::Tensor qs = in_rows(q), ks = in_rows(k), vs = in_rows(v);
  const at::Tensor marks = mask ? mask->contiguous() : at::Tensor();
  const bool* seen = mask ? marks.const_data_ptr<bool>() : nullptr;
  int64_t keys = T;
  while (seen && keys > 0 && !seen[keys - 1]) keys--;
  if (std::all_of(seen, seen ? seen + keys : seen, [](bool mark) { return mark; }))
    seen = nullptr;
  at::Tensor y = at::empty(q.sizes(), q.options());
  AT_DISPATCH_V2(q.scalar_type(), "single_query_attention", AT_WRAP([&] {
    const scalar_t* Q = qs.const_data_ptr<scalar_t>();
    const scalar_t *K = ks.const_data_ptr<scalar_t>(), *V = vs.const_data_ptr<scalar_t>();
    scalar_t* Y = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / H, h = i % H, shared = h / group;  // neighbours share keys
        attend(Q + b * qs.stride(0) + h * qs.stride(1),
               K + b * ks.stride(0) + shared * ks.stride(1), ks.stride(2),
               V + b * vs.stride(0) + shared * vs.stride(1), vs.stride(2), seen, keys, D,
               Y + i * D);
      }
    });
  }), at::kFloat, at::kBFloat16);
  return y;
}

TORCH_LIBRARY_FRAGMENT(gptlite, m) {
  m.def("single_query_attention(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor");
}
TORCH_LIBRARY_IMPL(gptlite, CPU, m) {
  m.impl("single_query_attention", single_query_attention);
}
