// minibatch_stddev: equations and shapes in ops.h.
#include <cmath>

#include "ops.h"

namespace minegan {
namespace {

constexpr int kLanes = 16;           // elements that a loop takes at a time
constexpr int64_t kAlone = 1 << 16;  // below this many elements a second thread costs more to start than it gives
constexpr double kEps = 1e-8;

enum class Pass { forward, backward, double_backward };

// forward: x -> y. backward: x, dy = given, D -> dx = out. double_backward: x, ddx = given, D -> ddy = y, gx = out.
template <class T>
struct Tensors {
  const T *x, *given;
  const wide_t<T>* D;
  T *y, *out;
};

// The group's samples at `width` elements that follow each other: at x + from + sample * plane, and in a tensor with
// the appended channels at to + sample * tall. Returns the sum of what its feature averages.
template <class T, Pass pass>
MINEGAN_INLINE wide_t<T> block(const Tensors<T>& t, const Groups& s, int64_t from, int64_t plane, int64_t to,
                               int64_t tall, wide_t<T> share, int width) {
  using A = wide_t<T>;
  const A part = A(1) / A(s.size);
  A mean[kLanes] = {}, square[kLanes] = {}, along[kLanes] = {}, other[kLanes] = {};
  for (int64_t g = 0; g < s.size; ++g)
    for (int j = 0; j < width; ++j) {
      mean[j] += widen(t.x[from + g * plane + j]) * part;
      if (pass == Pass::double_backward) other[j] += widen(t.given[from + g * plane + j]) * part;
    }
  for (int64_t g = 0; g < s.size; ++g)
    for (int j = 0; j < width; ++j) {
      const A d = widen(t.x[from + g * plane + j]) - mean[j];
      square[j] += d * d;
      if (pass == Pass::double_backward) along[j] += d * widen(t.given[from + g * plane + j]);
    }
  A deviation[kLanes], sum = 0;
  for (int j = 0; j < width; ++j) {
    deviation[j] = std::sqrt(square[j] * part + A(kEps));
    if (pass == Pass::double_backward) along[j] *= part / deviation[j];
  }
  for (int j = 0; j < width; ++j) sum += pass == Pass::forward ? deviation[j] : along[j];
  for (int64_t g = 0; g < s.size; ++g)
    for (int j = 0; j < width; ++j) {
      const int64_t at = from + g * plane + j, above = to + g * tall + j;
      if (pass == Pass::forward) {
        t.y[above] = t.x[at];
        continue;
      }
      const A d = widen(t.x[at]) - mean[j], scale = share / deviation[j];
      if (pass == Pass::backward) {
        t.out[at] = narrow<T>(widen(t.given[above]) + scale * d);
      } else {
        t.y[above] = t.given[at];
        t.out[at] = narrow<T>(scale * (widen(t.given[at]) - other[j] - along[j] * d / deviation[j]));
      }
    }
  return sum;
}

// A feature is a run of elements of a contiguous sample, and of each pixel of a channels-last one.
template <class T, Pass pass>
struct Range {
  static MINEGAN_INLINE void run(const Tensors<T>* tensors, const Groups* shape, int64_t begin, int64_t end) {
    using A = wide_t<T>;
    const Tensors<T>& t = *tensors;
    const Groups& s = *shape;
    const int64_t pixels = s.channels_last ? s.pixels : 1, length = s.C * s.pixels / s.features / pixels;
    const int64_t sample = s.C * s.pixels, tall = (s.C + s.features) * s.pixels, elements = pixels * length;
    for (int64_t m = begin; m < end; ++m)
      for (int64_t f = 0; f < s.features; ++f) {
        const A share = pass == Pass::forward ? A(0) : t.D[m * s.features + f] / A(elements * s.size);
        double total = 0;
        for (int64_t p = 0; p < pixels; ++p) {
          const int64_t from = m * sample + (p * s.features + f) * length;
          const int64_t to = m * tall + (s.channels_last ? p * (s.C + s.features) : 0) + f * length;
          int64_t i = 0;
          for (; i + kLanes <= length; i += kLanes)
            total += block<T, pass>(t, s, from + i, s.groups * sample, to + i, s.groups * tall, share, kLanes);
          if (i < length)
            total += block<T, pass>(t, s, from + i, s.groups * sample, to + i, s.groups * tall, share, int(length - i));
        }
        if (pass == Pass::backward) continue;
        const T value = narrow<T>(A(total / elements));
        for (int64_t g = 0; g < s.size; ++g) {
          T* y = t.y + (g * s.groups + m) * tall;
          for (int64_t p = 0; p < s.pixels; ++p)
            y[s.channels_last ? p * (s.C + s.features) + s.C + f : (s.C + f) * s.pixels + p] = value;
        }
      }
  }
};

template <Pass pass>
void every_group(DType dtype, const void* x, const void* given, const void* D, void* y, void* out, const Groups& s,
                 int threads) {
  if (s.pixels == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Tensors<T> tensors{(const T*)x, (const T*)given, (const wide_t<T>*)D, (T*)y, (T*)out};
    const bool alone = s.size * s.groups * s.C * s.pixels < kAlone;
    parallel_for(s.groups, alone ? 1 : threads,
                 [&](int64_t begin, int64_t end) { run<Range<T, pass>>(&tensors, &s, begin, end); });
  });
}

}  // namespace

void minibatch_stddev_cpu(DType dtype, const void* x, void* y, const Groups& s, int threads) {
  every_group<Pass::forward>(dtype, x, nullptr, nullptr, y, nullptr, s, threads);
}

void minibatch_stddev_backward_cpu(DType dtype, const void* dy, const void* D, const void* x, void* dx, const Groups& s,
                                   int threads) {
  every_group<Pass::backward>(dtype, x, dy, D, nullptr, dx, s, threads);
}

void minibatch_stddev_double_backward_cpu(DType dtype, const void* ddx, const void* D, const void* x, void* ddy,
                                          void* gx, const Groups& s, int threads) {
  every_group<Pass::double_backward>(dtype, x, ddx, D, ddy, gx, s, threads);
}

}  // namespace minegan
