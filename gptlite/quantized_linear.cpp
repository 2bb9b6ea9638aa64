// y = W x + b with W in codes of eight or four bits: x is rounded to eight bits, too, and integers are multiplied.
#include <ATen/Dispatch_v2.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

#include <optional>
#include <vector>

#include "lanes.h"

constexpr int64_t BLOCK = 64;  // numbers of x that share a scale
constexpr int64_t SIDE = 32;   // rows of W side by side: each has a number of its own in two vectors
constexpr int64_t NEAR = 128;  // rows of x that stay in a core's cache while all of W meets them
constexpr int ROWS = 4;        // rows of x that meet a vector of W while a register holds it

typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
// these lie in tensors, which may begin anywhere, as those of a file do
typedef uint8_t Codes __attribute__((vector_size(64), aligned(1)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

// x as scale * code, with one scale for each BLOCK numbers of a row
struct Rounded {
  std::vector<int8_t> codes;
  std::vector<float> scale;
  std::vector<int32_t> excess;  // W's codes are stored without a sign: what that adds to a block's product

  template <typename T>
  void round_block(const T* x, int64_t block, int zero) {
    float most[16] = {0}, poison = 0;
    for (int64_t j = 0; j < BLOCK; j++) {
      const float size = std::abs(static_cast<float>(x[j]));
      most[j % 16] = size > most[j % 16] ? size : most[j % 16];
      poison += 0 * size;  // NaN if a number is infinite or NaN
    }
    for (int64_t j = 1; j < 16; j++) most[0] = std::max(most[0], most[j]);
    const float inverse = most[0] > 0 ? 127 / most[0] : 0;
    int32_t sum = 0;
    for (int64_t j = 0; j < BLOCK; j++) {
      const float code = static_cast<float>(x[j]) * inverse;
      const int32_t nearest = static_cast<int32_t>(code + (code < 0 ? -0.5f : 0.5f));
      codes[block * BLOCK + j] = static_cast<int8_t>(nearest);
      sum += nearest;
    }
    scale[block] = most[0] / 127 + poison;
    excess[block] = zero * sum;
  }
};

// adds to each of 16 sums the products of four codes of a row with four numbers: one instruction where there is VNNI
inline Ints multiply_add(Ints sums, Codes w, const int8_t* x) {
#ifdef __AVX512VNNI__
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(*(const int32_t*)x));
#else
  const auto wide = (Ints)w;  // four codes in each
  for (int q = 0; q < 4; q++) sums += (wide >> 8 * q & 255) * x[q];
  return sums;
#endif
}

// SIDE rows of W times SOME rows of x, from `row` on -> y (SOME, SIDE)
template <int BITS, int SOME>
void side_by_side(const Codes* w, const Halves* scale, int64_t groups, const Rounded& x, int64_t row, int64_t blocks, Floats* y) {
  Floats sums[SOME][2] = {};
  for (int64_t g = 0, b = 0; g < groups; g++, scale += 2) {
    Floats wide[2];
    for (int v = 0; v < 2; v++) wide[v] = (Floats)(__builtin_convertvector(scale[v], Ints) << 16);  // from bfloat16
    for (const int64_t end = b + blocks / groups; b < end; b++) {
      Ints dots[SOME][2] = {};
      for (int64_t k = 0; k < BLOCK; k += 32 / BITS, w += 2) {
        for (int r = 0; r < SOME; r++) {
          const int8_t* numbers = &x.codes[((row + r) * blocks + b) * BLOCK + k];
          for (int v = 0; v < 2; v++) {
            if (SOME == 1) __builtin_prefetch((const char*)(w + v) + AHEAD, 0, 2);
            dots[r][v] = multiply_add(dots[r][v], BITS == 8 ? w[v] : w[v] & 15, numbers);
            if (BITS == 4) dots[r][v] = multiply_add(dots[r][v], w[v] >> 4, numbers + 4);
          }
        }
      }
      for (int r = 0; r < SOME; r++) {
        const int64_t at = (row + r) * blocks + b;
        for (int v = 0; v < 2; v++)
          sums[r][v] += __builtin_convertvector(dots[r][v] - x.excess[at], Floats) * (wide[v] * x.scale[at]);
      }
    }
  }
  for (int r = 0; r < SOME; r++)
    for (int v = 0; v < 2; v++) y[2 * r + v] = sums[r][v];
}

template <int BITS, typename T>
void linear(const T* x, const Codes* w, const Halves* scale, const T* bias, T* y, int64_t rows, int64_t N, int64_t K, int64_t groups) {
  const int64_t blocks = K / BLOCK, all = rows * blocks;
  Rounded rounded{std::vector<int8_t>(rows * K), std::vector<float>(all), std::vector<int32_t>(all)};
  at::parallel_for(0, all, 512, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) rounded.round_block(x + b * BLOCK, b, 1 << (BITS - 1));
  });
  at::parallel_for(0, (N + SIDE - 1) / SIDE, 1, [&](int64_t begin, int64_t end) {
    Floats sums[2 * ROWS];
    for (int64_t first = 0; first < rows; first += NEAR)
      for (int64_t i = begin; i < end; i++)
        for (int64_t row = first, last = std::min(rows, first + NEAR), some; row < last; row += some) {
          some = last - row < ROWS ? 1 : ROWS;
          const auto run = some == 1 ? side_by_side<BITS, 1> : side_by_side<BITS, ROWS>;
          run(w + i * SIDE * K * BITS / 512, scale + 2 * i * groups, groups, rounded, row, blocks, sums);
          for (int64_t r = 0; r < some; r++)
            for (int64_t n = i * SIDE; n < std::min(N, (i + 1) * SIDE); n++) {
              const float sum = reinterpret_cast<float*>(sums)[r * SIDE + n % SIDE];
              y[(row + r) * N + n] = static_cast<T>(sum + (bias ? static_cast<float>(bias[n]) : 0));
            }
        }
  });
}

// x (..., K), codes (N / 32, K bits / 32, 128) uint8, scale (N / 32, groups, 32) bfloat16, bias (N,) or none -> (..., N)
at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scale,
                            const std::optional<at::Tensor>& bias, int64_t N) {
  const int64_t sides = (N + SIDE - 1) / SIDE, K = x.dim() ? x.size(-1) : 0, blocks = K / BLOCK;
  TORCH_CHECK_VALUE(K > 0 && K % BLOCK == 0, "the rows are ", x.sizes(), ", but must end in a multiple of ", BLOCK, " columns.");
  const int64_t bits = codes.dim() == 3 ? 32 * codes.size(1) / K : 0, groups = scale.dim() == 3 ? scale.size(1) : 0;
  TORCH_CHECK_VALUE((bits == 8 || bits == 4) && codes.sizes() == at::IntArrayRef({sides, K * bits / 32, 4 * SIDE}),
                    "the codes are ", codes.sizes(), ", but for ", N, " rows of ", K, " must be packed with 8 or 4 bits.");
  TORCH_CHECK_VALUE(groups > 0 && blocks % groups == 0 && scale.sizes() == at::IntArrayRef({sides, groups, SIDE}),
                    "the scales are ", scale.sizes(), ", but must be (", sides, ", groups, ", SIDE, "), groups dividing ", blocks, ".");
  TORCH_CHECK_VALUE(!bias || bias->numel() == N, "the bias has ", bias ? bias->numel() : 0, " numbers, but must have ", N, ".");
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte && scale.scalar_type() == at::kBFloat16,
                   "codes and scales are ", codes.scalar_type(), " and ", scale.scalar_type(), ", but must be Byte and BFloat16.");
  TORCH_CHECK_TYPE(!bias || bias->scalar_type() == x.scalar_type(), "the rows are ", x.scalar_type(), ", but the bias is ",
                   bias ? bias->scalar_type() : x.scalar_type(), "; both must be alike.");
  const int64_t rows = x.numel() / K;
  auto shape = x.sizes().vec();
  shape.back() = N;
  const at::Tensor xs = x.contiguous(), w = codes.contiguous(), s = scale.contiguous();
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  at::Tensor y = at::empty(shape, x.options());
  AT_DISPATCH_V2(x.scalar_type(), "quantized_linear", AT_WRAP([&] {
    const scalar_t* B = bias ? b.const_data_ptr<scalar_t>() : nullptr;
    const auto run = bits == 8 ? linear<8, scalar_t> : linear<4, scalar_t>;
    run(xs.const_data_ptr<scalar_t>(), (const Codes*)w.const_data_ptr<uint8_t>(), (const Halves*)s.const_data_ptr<c10::BFloat16>(), B,
        y.mutable_data_ptr<scalar_t>(), rows, N, K, groups);
  }), at::kFloat, at::kBFloat16);
  return y;
}

TORCH_LIBRARY_FRAGMENT(gptlite, m) {
  m.def("quantized_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int N) -> Tensor");
}
TORCH_LIBRARY_IMPL(gptlite, CPU, m) { m.impl("quantized_linear", quantized_linear); }
