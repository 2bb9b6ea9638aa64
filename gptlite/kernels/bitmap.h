// Rows of numbers times a row of weights, kept as its nonzero numbers and a bit for each place.
#pragma once
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstdint>

#include "lanes.h"

constexpr int WORD = 64;  // weights that share a word of bits
constexpr int PARTS = WORD / 16;

typedef float Weights __attribute__((vector_size(64)));  // 16 of them

// the next numbers where a bit is set, zeros elsewhere
inline Weights expand(const float*& numbers, uint16_t bits) {
#ifdef __AVX512F__  // one instruction
  const Weights w = (Weights)_mm512_maskz_expandloadu_ps(bits, numbers);
  numbers += __builtin_popcount(bits);
#else
  Weights w;
  for (int j = 0; j < 16; j++) w[j] = bits >> j & 1 ? *numbers++ : 0;
#endif
  return w;
}

// y[0], y[step], ...: a row of W times each of R rows of x, which have as many whole words
template <int R>
void row_times(const float* numbers, const int64_t* bits, int64_t words, const Weights* x,
               float* y, int64_t step) {
  Weights sums[R][PARTS] = {};  // one sum alone would wait for each addition
  for (int64_t word = 0; word < words; word++)
    for (int part = 0; part < PARTS; part++) {
      __builtin_prefetch(reinterpret_cast<const char*>(numbers) + AHEAD, 0, 2);
      const Weights w = expand(numbers, static_cast<uint16_t>(bits[word] >> 16 * part));
      for (int r = 0; r < R; r++) sums[r][part] += w * x[(r * words + word) * PARTS + part];
    }
  for (int r = 0; r < R; r++) {
    for (int part = 1; part < PARTS; part++) sums[r][0] += sums[r][part];
    y[r * step] = 0;
    for (int j = 0; j < 16; j++) y[r * step] += sums[r][0][j];
  }
}
