// y = W x + b for few rows x, as fast as memory delivers W: each row is read once, in order.
#include <ATen/Dispatch_v2.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "lanes.h"

// x (..., K), weight (N, K), bias (N,) or none -> (..., N), accumulated in float32
at::Tensor gemv(const at::Tensor& x, const at::Tensor& weight,
                const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) > 0,
                    "the weight is ", weight.sizes(), ", but must be (N, K).");
  const int64_t N = weight.size(0), K = weight.size(1), rows = x.numel() / K;
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == K,
                    "the rows are ", x.sizes(), ", but must end in ", K, " columns.");
  TORCH_CHECK_VALUE(!bias || bias->numel() == N, "the bias has ", bias ? bias->numel() : 0,
                    " numbers, but must have ", N, ".");
  const auto type = weight.scalar_type();
  TORCH_CHECK_TYPE(x.scalar_type() == type && (!bias || bias->scalar_type() == type),
                   "the rows are ", x.scalar_type(), ", but the weight is ", type,
                   "; all must be alike.");
  auto shape = x.sizes().vec();
  shape.back() = N;
  const at::Tensor xs = x.contiguous(), w = weight.contiguous();
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  at::Tensor y = at::empty(shape, x.options());
  AT_DISPATCH_V2(type, "gemv", AT_WRAP([&] {
    const scalar_t *X = xs.const_data_ptr<scalar_t>(), *W = w.const_data_ptr<scalar_t>();
    const scalar_t* B = bias ? b.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* Y = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, N, 32, [&](int64_t begin, int64_t end) {
      // converted once a thread, not once a row of W
      const std::vector<float> wide(X, X + rows * K);
      for (int64_t i = begin; i < end; i++)
        // a row of W comes from memory once, and then from the cache
        for (int64_t r = 0; r < rows; r++) {
          const float sum = dot(W + i * K, &wide[r * K], K);
          Y[r * N + i] = static_cast<scalar_t>(sum + (B ? static_cast<float>(B[i]) : 0));
        }
    });
  }), at::kFloat, at::kBFloat16);
  return y;
}

TORCH_LIBRARY_FRAGMENT(gptlite, m) {
  m.def("gemv(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}
TORCH_LIBRARY_IMPL(gptlite, CPU, m) { m.impl("gemv", gemv); }
