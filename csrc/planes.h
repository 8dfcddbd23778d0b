// Passes over tensors [B, C, P], P the positions of an image, that lie as [B, C, P] or, channels last, as [B, P, C]:
// element by element, with coefficients of each (sample, channel) and sums over the positions.
#pragma once

#include <algorithm>

#include "ops.h"

namespace minegan {
namespace planes {

constexpr int kLanes = 16;           // running sums of a plane: the same on every instruction set, hence the same bits
constexpr int64_t kPixels = 256;     // channels last: pixels whose sum is one partial sum
constexpr int64_t kAlone = 1 << 17;  // below this many elements a second thread costs more to start than it gives

// Says of a loop that no iteration reads what another writes: a pass has too many pointers for GCC to find that out.
#if defined(__GNUC__) && !defined(__clang__)
#define MINEGAN_INDEPENDENT _Pragma("GCC ivdep")
#else
#define MINEGAN_INDEPENDENT
#endif

// What a pass reads and writes. F has the constants inputs, outputs, coefficients and sums, and
//   f(v [inputs], n, k [coefficients], out [outputs], sum [sums])
// for an element, its position's noise n and its channel's coefficients k.
template <class T, class F>
struct Tensors {
  using A = wide_t<T>;
  const T* in[F::inputs];
  T* out[F::outputs];
  const A* noise;  // [B or 1, P] or null
  const A* k;      // [coefficients, B, C]
  A* sums;         // [sums, B, C]; channels last [blocks of kPixels, sums, C] of each sample
  Planes shape;
  F f;

  // Elements at + j, j < width: of neighbouring positions of one channel or, `along`, of the channels of one position,
  // whose k and sums run along.
  template <bool along>
  MINEGAN_INLINE void segment(int64_t at, int64_t width, const A* noise, const A* const* k, A* const* sums) const {
    const A n = along && noise ? *noise : A(0);
    MINEGAN_INDEPENDENT
    for (int64_t j = 0; j < width; ++j) {
      A v[F::inputs], kj[F::coefficients], result[F::outputs], sum[F::sums + 1];  // an array has an element at least
      for (int m = 0; m < F::inputs; ++m) v[m] = widen(in[m][at + j]);
      for (int m = 0; m < F::coefficients; ++m) kj[m] = k[m][along ? j : 0];
      f(v, along || !noise ? n : noise[j], kj, result, sum);
      for (int m = 0; m < F::outputs; ++m) out[m][at + j] = narrow<T>(result[m]);
      for (int m = 0; m < F::sums; ++m) sums[m][j] += sum[m];
    }
  }
};

template <class T, class F>
struct Contiguous {  // a unit is a plane
  static MINEGAN_INLINE void run(const Tensors<T, F>* tensors, int64_t begin, int64_t end) {
    using A = wide_t<T>;
    const Tensors<T, F> t = *tensors;
    const Planes s = t.shape;
    for (int64_t u = begin; u < end; ++u) {
      const A* noise = t.noise ? t.noise + u / s.C * s.noise_batch : nullptr;
      A lanes[F::sums + 1][kLanes] = {};
      const A* k[F::coefficients];
      A* sums[F::sums + 1];
      for (int m = 0; m < F::coefficients; ++m) k[m] = t.k + m * s.B * s.C + u;
      for (int m = 0; m < F::sums; ++m) sums[m] = lanes[m];
      // The width of a whole run is a constant to the compiler, that of the rest is not.
      int64_t i = 0;
      for (; i + kLanes <= s.P; i += kLanes)
        t.template segment<false>(u * s.P + i, kLanes, noise ? noise + i : noise, k, sums);
      t.template segment<false>(u * s.P + i, s.P - i, noise ? noise + i : noise, k, sums);
      for (int m = 0; m < F::sums; ++m) {
        A sum = 0;
        for (const A lane : lanes[m]) sum += lane;
        t.sums[m * s.B * s.C + u] = sum;
      }
    }
  }
};

template <class T, class F>
struct ChannelsLast {  // a unit is a block of kPixels pixels of a sample
  static MINEGAN_INLINE void run(const Tensors<T, F>* tensors, int64_t begin, int64_t end) {
    using A = wide_t<T>;
    const Tensors<T, F> t = *tensors;
    const Planes s = t.shape;
    const int64_t blocks = (s.P + kPixels - 1) / kPixels;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t b = u / blocks, first = u % blocks * kPixels;
      const A* k[F::coefficients];
      A* sums[F::sums + 1];
      for (int m = 0; m < F::coefficients; ++m) k[m] = t.k + (m * s.B + b) * s.C;
      for (int m = 0; m < F::sums; ++m) sums[m] = t.sums + (u * F::sums + m) * s.C;
      for (int64_t p = first; p < std::min(first + kPixels, s.P); ++p)
        t.template segment<true>((b * s.P + p) * s.C, s.C, t.noise ? t.noise + b * s.noise_batch + p : nullptr, k,
                                 sums);
    }
  }
};

template <class T, class F>
void pass(Tensors<T, F> t, int threads) {
  using A = wide_t<T>;
  const Planes s = t.shape;
  const int sharing = s.B * s.C * s.P < kAlone ? 1 : threads;
  if (!s.last) {
    return parallel_for(s.B * s.C, sharing, [&](int64_t begin, int64_t end) { run<Contiguous<T, F>>(&t, begin, end); });
  }
  // Units of one sample add to the same channels: each has sums of its own, which are added up in a fixed order.
  const int64_t blocks = (s.P + kPixels - 1) / kPixels;
  A* const totals = t.sums;
  std::vector<A> partial(s.B * blocks * F::sums * s.C);
  t.sums = partial.data();
  parallel_for(s.B * blocks, sharing, [&](int64_t begin, int64_t end) { run<ChannelsLast<T, F>>(&t, begin, end); });
  for (int m = 0; m < F::sums; ++m) {
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t c = 0; c < s.C; ++c) {
        double total = 0;
        for (int64_t u = b * blocks; u < (b + 1) * blocks; ++u) total += partial[(u * F::sums + m) * s.C + c];
        totals[(m * s.B + b) * s.C + c] = A(total);
      }
    }
  }
}

// Tensors of a pass from addresses without type.
template <class T, class F>
Tensors<T, F> tensors(std::initializer_list<const void*> in, std::initializer_list<void*> out, const void* noise,
                      const void* k, void* sums, const Planes& shape, F f) {
  Tensors<T, F> t{};
  for (int m = 0; m < F::inputs; ++m) t.in[m] = (const T*)in.begin()[m];
  for (int m = 0; m < F::outputs; ++m) t.out[m] = (T*)out.begin()[m];
  t.noise = (const wide_t<T>*)noise, t.k = (const wide_t<T>*)k, t.sums = (wide_t<T>*)sums;
  t.shape = shape, t.f = f;
  return t;
}

}  // namespace planes
}  // namespace minegan
