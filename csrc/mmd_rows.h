// A row of pairs, as mmd and mmd_groups need it: equations and shapes in ops.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "exponential.h"
#include "ops.h"

namespace minegan {
namespace {

constexpr int kLanes = 128;           // columns that are worked on together, where a row is long
constexpr int64_t kAlone = 1 << 15;   // below this many pairs a second thread costs more to start than it gives
constexpr float kClose = 1.0f / 256;  // |p - q|² below this part of |p|² + |q|² is taken from differences: products
                                      // leave too few digits of it, and energy's derivatives divide by it

MINEGAN_INLINE float dot_of_differences(const float* a, const float* b, const float* u, const float* v, int64_t D) {
  constexpr int lanes_of_a_pair = 32;
  float lanes[lanes_of_a_pair] = {};
  const int64_t whole = D / lanes_of_a_pair * lanes_of_a_pair;
  for (int64_t d = 0; d < whole; d += lanes_of_a_pair)
    for (int l = 0; l < lanes_of_a_pair; ++l) lanes[l] += (a[d + l] - b[d + l]) * (u[d + l] - v[d + l]);
  for (int64_t d = whole; d < D; ++d) lanes[d - whole] += (a[d] - b[d]) * (u[d] - v[d]);
  double sum = 0;
  for (const float lane : lanes) sum += lane;
  return float(sum);
}

// In place: t becomes A (or w f, for order -1), s becomes B. Returns the sum of f.
template <Kernel kernel, int order, int lanes = kLanes>
struct RowLoop {
  static MINEGAN_INLINE double run(const MmdTile& tile, int64_t r) {
    constexpr bool squared = kernel == Kernel::gaussian || kernel == Kernel::energy;
    const int64_t D = tile.D, stride = tile.stride;
    const float *p = tile.p + r * stride, *hp = tile.hp ? tile.hp + r * stride : nullptr;
    float *t_row = tile.t + r * tile.columns, *s_row = order == 2 ? tile.s + r * tile.columns : nullptr;
    const float offset = tile.op[r], slope = order == 2 ? tile.hop[r] : 0;
    const float norm = kernel == Kernel::energy ? std::sqrt(offset) : 0;
    const float weight = float(tile.weight), a_weight = squared ? 2 * weight : weight,
                b_weight = squared ? 4 * weight : weight;
    const int64_t start = tile.diagonal ? r + 1 : 0;
    if (order != 0) std::fill(t_row, t_row + std::min(start, tile.columns), 0.0f);
    if (order == 2) std::fill(s_row, s_row + std::min(start, tile.columns), 0.0f);
    double sums[lanes] = {};
    for (int64_t first = start; first < tile.columns; first += lanes) {
      const int n = int(std::min<int64_t>(lanes, tile.columns - first));
      float t[lanes] = {}, s[lanes] = {}, f[lanes] = {}, f1[lanes] = {}, f2[lanes] = {};
      for (int l = 0; l < n; ++l) t[l] = t_row[first + l];
      if (order == 2)
        for (int l = 0; l < n; ++l) s[l] = s_row[first + l];
      float limit[lanes] = {}, norms[lanes] = {};
      if (kernel == Kernel::energy)
        for (int l = 0; l < n; ++l) {
          const float other = std::sqrt(tile.oq[first + l]);
          norms[l] = norm + other;
          f[l] = 2 * (norm * other + t[l]);
        }
      if (kernel != Kernel::laplacian) {
        for (int l = 0; l < n; ++l) limit[l] = offset + tile.oq[first + l];
        for (int l = 0; l < lanes; ++l) t[l] = limit[l] + (squared ? -2 : 1) * t[l];
        if (order == 2)
          for (int l = 0; l < n; ++l) s[l] = slope + tile.hoq[first + l] + (squared ? -1 : 1) * s[l];
      }
      if (squared) {
        int close = 0;
        for (int l = 0; l < n; ++l) close |= t[l] < kClose * limit[l];
        if (close)
          for (int l = 0; l < n; ++l)
            if (t[l] < kClose * limit[l]) {
              const float* q = tile.q + (first + l) * stride;
              t[l] = dot_of_differences(p, q, p, q, D);
              if (kernel == Kernel::energy) f[l] = (norms[l] - std::sqrt(t[l])) * (norms[l] + std::sqrt(t[l]));
              if (order == 2) s[l] = dot_of_differences(p, q, hp, tile.hq + (first + l) * stride, D);
            }
      }
      if (kernel == Kernel::polynomial) {
        const float c = float(tile.numbers[0]), b = float(tile.numbers[1]);
        for (int l = 0; l < lanes; ++l) {
          const float e = c * t[l];
          f[l] = e * (3 * b * b + 3 * b * e + e * e);
          f1[l] = 3 * c * (b + e) * (b + e);
          f2[l] = 6 * c * c * (b + e);
        }
      } else if (kernel == Kernel::energy) {
        for (int l = 0; l < lanes; ++l) {
          const float root = std::sqrt(t[l]), inverse = t[l] > 0 ? 1 / root : 0.0f;
          const float sum = norms[l] + root;
          f[l] = sum > 0 ? f[l] / sum : sum;
          f1[l] = -0.5f * inverse;
          f2[l] = 0.25f * inverse * inverse * inverse;
        }
      } else {
        float e[lanes] = {};
        for (int64_t i = 0; i < tile.count; ++i) {
          const float c = float(tile.numbers[i]);
          if (tile.squarings[i] == 0)
            for (int l = 0; l < lanes; ++l) e[l] = exponential(c * t[l]);
          for (int64_t k = 0; k < tile.squarings[i]; ++k)  // what would be subnormal is slow, and nothing beside 1
            for (int l = 0; l < lanes; ++l) e[l] = e[l] > 1e-18f ? e[l] * e[l] : 0.0f;
          for (int l = 0; l < lanes; ++l) f[l] += e[l];
          if (order >= 1)
            for (int l = 0; l < lanes; ++l) f1[l] += c * e[l];
          if (order == 2)
            for (int l = 0; l < lanes; ++l) f2[l] += c * c * e[l];
        }
      }
      for (int l = 0; l < n; ++l) sums[l] += f[l];
      if (order == -1)
        for (int l = 0; l < n; ++l) t_row[first + l] = weight * f[l];
      if (order >= 1)
        for (int l = 0; l < n; ++l) t_row[first + l] = a_weight * f1[l];
      if (order == 2)
        for (int l = 0; l < n; ++l) s_row[first + l] = b_weight * f2[l] * s[l];
    }
    double total = 0;
    for (const double sum : sums) total += sum;
    return tile.weight * total;
  }
};

}  // namespace
}  // namespace minegan
