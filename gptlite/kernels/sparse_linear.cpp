// y = W x + b for few rows x, with W as its nonzero numbers and a bit for each place.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>

#include "bitmap.h"

constexpr int ROWS = 4;  // rows of x that meet a weight while a register holds it

// x (..., K) float32, numbers (nnz,) float32, bits (N, words of K) and starts (N + 1,) int64,
// bias (N,) or none -> (..., N)
at::Tensor bitmap_linear(const at::Tensor& x, const at::Tensor& numbers, const at::Tensor& bits,
                         const at::Tensor& starts, const std::optional<at::Tensor>& bias) {
  const int64_t K = x.dim() ? x.size(-1) : 0, words = (K + WORD - 1) / WORD;
  TORCH_CHECK_VALUE(K > 0 && bits.dim() == 2 && bits.size(1) == words, "the bits are ",
                    bits.sizes(), ", but the rows are ", x.sizes(), "; a word for each ", WORD,
                    " columns is right.");
  const int64_t N = bits.size(0), rows = x.numel() / K;
  TORCH_CHECK_VALUE(starts.numel() == N + 1, "there are ", starts.numel(), " starts, but ", N,
                    " rows must have ", N + 1, ".");
  TORCH_CHECK_VALUE(!bias || bias->numel() == N, "the bias has ", bias ? bias->numel() : 0,
                    " numbers, but must have ", N, ".");
  for (const auto& t : {x, numbers, bias.value_or(x)})
    TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, "a tensor is ", t.scalar_type(),
                     ", but must be Float.");
  for (const auto& t : {bits, starts})
    TORCH_CHECK_TYPE(t.scalar_type() == at::kLong, "a tensor is ", t.scalar_type(),
                     ", but must be Long.");
  auto shape = x.sizes().vec();
  shape.back() = N;
  const at::Tensor n = numbers.contiguous(), w = bits.contiguous(), s = starts.contiguous();
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  // aligned, in whole words
  const at::Tensor padded = at::zeros({rows, words * WORD}, x.options());
  padded.narrow(1, 0, K).copy_(x.reshape({rows, K}));
  at::Tensor y = at::empty(shape, x.options());
  const auto* X = reinterpret_cast<const Weights*>(padded.const_data_ptr<float>());
  const float* numbers_of = n.const_data_ptr<float>();
  const float* B = bias ? b.const_data_ptr<float>() : nullptr;
  const int64_t *W = w.const_data_ptr<int64_t>(), *S = s.const_data_ptr<int64_t>();
  float* Y = y.mutable_data_ptr<float>();
  TORCH_CHECK_VALUE(S[N] == n.numel(), "there are ", n.numel(),
                    " numbers, but the rows end at ", S[N], ".");
  at::parallel_for(0, N, 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      for (int64_t r = 0, some; r < rows; r += some) {
        some = rows - r < ROWS ? 1 : ROWS;
        const auto run = some == 1 ? row_times<1> : row_times<ROWS>;
        run(numbers_of + S[i], W + i * words, words, X + r * words * PARTS, Y + r * N + i, N);
      }
      if (B)
        for (int64_t r = 0; r < rows; r++) Y[r * N + i] += B[i];
    }
  });
  return y;
}

TORCH_LIBRARY_FRAGMENT(gptlite, m) {
  m.def(
      "bitmap_linear(Tensor x, Tensor numbers, Tensor bits, Tensor starts, Tensor? bias)"
      " -> Tensor");
}
TORCH_LIBRARY_IMPL(gptlite, CPU, m) { m.impl("bitmap_linear", bitmap_linear); }
