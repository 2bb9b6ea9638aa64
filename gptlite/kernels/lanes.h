// Shared by the kernels of a decoding step: a product in many partial sums, fed ahead of time.
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int64_t LANES = 64;    // independent sums: one alone would wait for each addition
constexpr int64_t AHEAD = 8192;  // bytes: what is read so much later is asked for now

template <typename T>
float dot(const T* w, const float* x, int64_t n) {
  float sums[LANES] = {0}, sum = 0;
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) {
    // into L2; behind the end it does nothing
    for (size_t line = 0; line < LANES * sizeof(T); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(w + k) + AHEAD + line, 0, 2);
    for (int64_t j = 0; j < LANES; j++) sums[j] += static_cast<float>(w[k + j]) * x[k + j];
  }
  for (; k < n; k++) sum += static_cast<float>(w[k]) * x[k];
  // in pairs: one by one would be a wait for each
#pragma GCC unroll 6
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; j++) sums[j] += sums[j + half];
  return sums[0] + sum;
}
