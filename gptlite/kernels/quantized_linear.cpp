// y = W x + b with W in codes of eight or four bits, for any number of rows x.
#include <ATen/Dispatch_v2.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "codes.h"

constexpr int ROWS = 4;        // rows of x that meet a vector of W while a register holds it
constexpr int64_t NEAR = 128;  // rows of x that stay in a core's cache while W meets them

template <int BITS, typename T>
void linear(const T* x, const Codes* w, const Halves* scale, const T* bias, T* y, int64_t rows,
            int64_t N, int64_t K, int64_t groups) {
  const int64_t blocks = K / BLOCK, all = rows * blocks;
  Rounded rounded{std::vector<int8_t>(rows * K), std::vector<float>(all),
                  std::vector<int32_t>(all)};
  at::parallel_for(0, all, 512, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      rounded.round_block(x + b * BLOCK, b, 1 << (BITS - 1));
  });
  at::parallel_for(0, (N + SIDE - 1) / SIDE, 1, [&](int64_t begin, int64_t end) {
    Floats sums[2 * ROWS];
    for (int64_t first = 0; first < rows; first += NEAR)
      for (int64_t i = begin; i < end; i++)
        for (int64_t row = first, some; row < std::min(rows, first + NEAR); row += some) {
          some = std::min(rows, first + NEAR) - row < ROWS ? 1 : ROWS;
          const auto run = some == 1 ? side_by_side<BITS, 1> : side_by_side<BITS, ROWS>;
          run(w + i * SIDE * K * BITS / 512, scale + 2 * i * groups, groups, rounded, row,
              blocks, sums);
          const int64_t n = i * SIDE, count = std::min(SIDE, N - n);
          for (int64_t r = 0; r < some; r++) {
            const float* sum = reinterpret_cast<float*>(sums) + r * SIDE;
            T* to = y + (row + r) * N + n;
            for (int64_t j = 0; j < count; j++)
              to[j] = static_cast<T>(sum[j] + (bias ? static_cast<float>(bias[n + j]) : 0));
          }
        }
  });
}

// x (..., K), codes (N / 32, K bits / 32, 128) uint8, scale (N / 32, groups, 32) bfloat16,
// bias (N,) or none -> (..., N)
at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& codes,
                            const at::Tensor& scale, const std::optional<at::Tensor>& bias,
                            int64_t N) {
  const int64_t sides = (N + SIDE - 1) / SIDE, K = x.dim() ? x.size(-1) : 0, blocks = K / BLOCK;
  TORCH_CHECK_VALUE(K > 0 && K % BLOCK == 0, "the rows are ", x.sizes(),
                    ", but must end in a multiple of ", BLOCK, " columns.");
  const int64_t bits = codes.dim() == 3 ? 32 * codes.size(1) / K : 0;
  const int64_t groups = scale.dim() == 3 ? scale.size(1) : 0;
  TORCH_CHECK_VALUE((bits == 8 || bits == 4) &&
                        codes.sizes() == at::IntArrayRef({sides, K * bits / 32, 4 * SIDE}),
                    "the codes are ", codes.sizes(), ", but for ", N, " rows of ", K,
                    " must be packed with 8 or 4 bits.");
  TORCH_CHECK_VALUE(groups > 0 && blocks % groups == 0 &&
                        scale.sizes() == at::IntArrayRef({sides, groups, SIDE}),
                    "the scales are ", scale.sizes(), ", but must be (", sides, ", groups, ",
                    SIDE, ") with groups that divide ", blocks, ".");
  TORCH_CHECK_VALUE(!bias || bias->numel() == N, "the bias has ", bias ? bias->numel() : 0,
                    " numbers, but must have ", N, ".");
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte && scale.scalar_type() == at::kBFloat16,
                   "codes and scales are ", codes.scalar_type(), " and ", scale.scalar_type(),
                   ", but must be Byte and BFloat16.");
  TORCH_CHECK_TYPE(!bias || bias->scalar_type() == x.scalar_type(), "the rows are ",
                   x.scalar_type(), ", but the bias is ",
                   bias ? bias->scalar_type() : x.scalar_type(), "; both must be alike.");
  const int64_t rows = x.numel() / K;
  auto shape = x.sizes().vec();
  shape.back() = N;
  const at::Tensor xs = x.contiguous(), w = codes.contiguous(), s = scale.contiguous();
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  at::Tensor y = at::empty(shape, x.options());
  const auto* W = (const Codes*)w.const_data_ptr<uint8_t>();
  const auto* S = (const Halves*)s.const_data_ptr<c10::BFloat16>();
  AT_DISPATCH_V2(x.scalar_type(), "quantized_linear", AT_WRAP([&] {
    const scalar_t *X = xs.const_data_ptr<scalar_t>();
    const scalar_t *B = bias ? b.const_data_ptr<scalar_t>() : nullptr;
    const auto run = bits == 8 ? linear<8, scalar_t> : linear<4, scalar_t>;
    run(X, W, S, B, y.mutable_data_ptr<scalar_t>(), rows, N, K, groups);
  }), at::kFloat, at::kBFloat16);
  return y;
}

TORCH_LIBRARY_FRAGMENT(gptlite, m) {
  m.def(
      "quantized_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int N) -> Tensor");
}
TORCH_LIBRARY_IMPL(gptlite, CPU, m) { m.impl("quantized_linear", quantized_linear); }
