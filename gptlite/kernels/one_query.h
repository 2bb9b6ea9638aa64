// Attention of one query: the keys and values that it may see are read once, and scores
// stay in the core's cache.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "lanes.h"

// e^x for x <= 0 within float32's rounding: 2^n e^r with |r| < 0.35, in steps that the compiler
// makes vectors of
inline float exp_below(float x) {
  const float n = std::nearbyint(std::max(x, -87.f) * 1.44269504f);
  // n ln 2 in two parts, the first exact
  const float r = std::max(x, -87.f) - n * 0.693359375f + n * 2.12194440e-4f;
  const float e =
      1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720)))));
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  return e * power;
}

// sums (n up to LANES) += the rows of v, each times its weight, in registers
template <typename T, bool whole>
void add_rows(const T* v, int64_t v_row, const float* weights, int64_t keys, int64_t n,
              float* sums) {
  float parts[LANES] = {0};
  for (int64_t j = 0; j < keys; j++)
    if (weights[j] > 0)  // what is not seen may hold anything
      for (int64_t d = 0; d < (whole ? LANES : n); d++)
        parts[d] += weights[j] * static_cast<float>(v[j * v_row + d]);
  std::copy(parts, parts + n, sums);
}

// one head: q (D), and keys and values of D numbers whose rows lie so many numbers apart; of
// them it sees those that `seen` marks, or all if that is null; the answer goes to y (D)
template <typename T>
void attend(const T* q, const T* k, int64_t k_row, const T* v, int64_t v_row, const bool* seen,
            int64_t keys, int64_t D, T* y) {
  std::vector<float> query(q, q + D), weights(keys), sums(D);
  float largest = -std::numeric_limits<float>::infinity(), total = 0;
  for (float& x : query) x /= std::sqrt(static_cast<float>(D));
  for (int64_t j = 0; j < keys; j++)
    if (!seen || seen[j])
      largest = std::max(largest, weights[j] = dot(k + j * k_row, query.data(), D));
  for (int64_t j = 0; j < keys; j++)
    weights[j] = seen && !seen[j] ? 0 : exp_below(weights[j] - largest);
  for (int64_t j = 0; j < keys; j++) total += weights[j];
  for (int64_t d = 0; d < D; d += LANES) {
    if (d + LANES <= D) add_rows<T, true>(v + d, v_row, weights.data(), keys, LANES, &sums[d]);
    else add_rows<T, false>(v + d, v_row, weights.data(), keys, D - d, &sums[d]);
  }
  for (int64_t d = 0; d < D; d++) y[d] = static_cast<T>(sums[d] / total);
}
