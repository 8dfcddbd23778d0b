// exp, and what follows from it, in arithmetic that compilers turn into vectors.
#pragma once

#include "common.h"

namespace minegan {
namespace {

// exp of a number that is not much above 0, to 2 units in the last place; 1e-38 for what is smaller.
MINEGAN_HD float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  // Adding 1.5 · 2^23 rounds to a whole number, which then stands in the last bits.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float whole = shifted - 12582912.0f;
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float y = 1.0f / 5040;
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return y * bits<float>((bits<int32_t>(shifted) - 0x4b400000 + 127) << 23);
}

// tanh to 2 units in the last place.
MINEGAN_HD float hyperbolic_tangent(float x) {
  const float size = x < 0 ? -x : x, square = x * x, e = exponential(-2 * size);
  const float large = (1 - e) / (1 + e);
  float small = -5.70498872745e-3f;
  small = small * square + 2.06390887954e-2f;
  small = small * square - 5.37397155531e-2f;
  small = small * square + 1.33314422036e-1f;
  small = small * square - 3.33332819422e-1f;
  small = small * square * x + x;
  return size < 0.625f ? small : x < 0 ? -large : large;
}

}  // namespace
}  // namespace minegan
