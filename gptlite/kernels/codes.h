// Rows of numbers times rows of codes: both become integers, and floats appear once a block.
#pragma once
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "lanes.h"

constexpr int64_t BLOCK = 64;  // numbers of x that share a scale
constexpr int64_t SIDE = 32;   // rows of W side by side: each has its own sum in two vectors

typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
// these lie in tensors, which may begin anywhere, as those of a file do
typedef uint8_t Codes __attribute__((vector_size(64), aligned(1)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

// adds to each of 16 sums the products of four codes of a row with four numbers
inline Ints multiply_add(Ints sums, Codes w, const int8_t* x) {
#ifdef __AVX512VNNI__  // one instruction
  const __m512i numbers = _mm512_set1_epi32(*(const int32_t*)x);
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, numbers);
#else
  const Ints fours = (Ints)w;
  for (int q = 0; q < 4; q++) sums += (fours >> 8 * q & 255) * x[q];
  return sums;
#endif
}

// x as scale * code, with one scale for each BLOCK numbers of a row
struct Rounded {
  std::vector<int8_t> codes;
  std::vector<float> scale;
  std::vector<int32_t> excess;  // what a block's product has too much, W's codes having no sign

  template <typename T>
  void round_block(const T* x, int64_t block, int zero) {
    float most[16] = {0}, poison = 0;
    for (int64_t j = 0; j < BLOCK; j++) {
      const float size = std::abs(static_cast<float>(x[j]));
      most[j % 16] = size > most[j % 16] ? size : most[j % 16];
      poison += 0 * size;  // NaN if a number is infinite or NaN
    }
    for (int64_t j = 1; j < 16; j++) most[0] = std::max(most[0], most[j]);
    const float inverse = most[0] > 1e-30f ? 127 / most[0] : 0;  // so small ones are zero
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

// SIDE rows of W times SOME rows of x, from `row` on -> y (SOME, SIDE)
template <int BITS, int SOME>
void side_by_side(const Codes* w, const Halves* scale, int64_t groups, const Rounded& x,
                  int64_t row, int64_t blocks, Floats* y) {
  Floats sums[SOME][2] = {};
  for (int64_t g = 0, b = 0; g < groups; g++, scale += 2) {
    Floats wide[2];  // a bfloat16 is the upper half of a float32
    for (int v = 0; v < 2; v++)
      wide[v] = (Floats)(__builtin_convertvector(scale[v], Ints) << 16);
    for (const int64_t end = b + blocks / groups; b < end; b++) {
      Ints dots[SOME][2] = {};
      for (int64_t k = 0; k < BLOCK; k += 32 / BITS, w += 2)
        for (int r = 0; r < SOME; r++) {
          const int8_t* numbers = &x.codes[((row + r) * blocks + b) * BLOCK + k];
          for (int v = 0; v < 2; v++) {
            if (SOME == 1) __builtin_prefetch((const char*)(w + v) + AHEAD, 0, 2);
            dots[r][v] = multiply_add(dots[r][v], BITS == 8 ? w[v] : w[v] & 15, numbers);
            if (BITS == 4) dots[r][v] = multiply_add(dots[r][v], w[v] >> 4, numbers + 4);
          }
        }
      for (int r = 0; r < SOME; r++) {
        const int64_t at = (row + r) * blocks + b;
        for (int v = 0; v < 2; v++)
          sums[r][v] += __builtin_convertvector(dots[r][v] - x.excess[at], Floats) *
                        (wide[v] * x.scale[at]);
      }
    }
  }
  for (int r = 0; r < SOME; r++)
    for (int v = 0; v < 2; v++) y[2 * r + v] = sums[r][v];
}
