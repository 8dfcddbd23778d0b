// demodulation: equations and shapes in ops.h.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"

namespace minegan {
namespace {

constexpr int kLanes = 16;           // running sums of a dot product
constexpr int64_t kAlone = 1 << 15;  // below this many elements a second thread costs more to start than it gives

template <class T>
MINEGAN_HD T norm(const T* w, const WeightRows& W) {
  T sum = 0;
  for (int64_t k = 0; k < W.K; ++k) sum += w[k * W.tap_stride] * w[k * W.tap_stride];
  return sum;
}

// squares [B, I] of the styles, computed once for all outputs.
template <class T>
struct Forward {
  static MINEGAN_INLINE void run(const T* __restrict squares, const T* __restrict w, T* __restrict d, T* __restrict q,
                                 int64_t B, int64_t O, WeightRows W, T eps, int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      T* row = q + o * W.I;
      for (int64_t i = 0; i < W.I; ++i) row[i] = norm(w + o * W.row_stride + i * W.input_stride, W);
      for (int64_t b = 0; b < B; ++b) {
        T lanes[kLanes] = {};
        const T* s = squares + b * W.I;
        int64_t i = 0;
        for (; i + kLanes <= W.I; i += kLanes)
          for (int j = 0; j < kLanes; ++j) lanes[j] += s[i + j] * row[i + j];
        T sum = 0;
        for (; i < W.I; ++i) sum += s[i] * row[i];
        for (const T lane : lanes) sum += lane;
        d[b * O + o] = 1 / std::sqrt(sum + eps);
      }
    }
  }
};

template <class T>
struct Styles {
  static MINEGAN_INLINE void run(const T* __restrict g, const T* __restrict s, const T* __restrict q, T* __restrict gs,
                                 int64_t B, int64_t O, int64_t I, int64_t begin, int64_t end) {
    for (int64_t b = 0; b < B; ++b) {
      T* out = gs + b * I;
      for (int64_t i = begin; i < end; ++i) out[i] = 0;
      for (int64_t o = 0; o < O; ++o)
        for (int64_t i = begin; i < end; ++i) out[i] += g[b * O + o] * q[o * I + i];
      for (int64_t i = begin; i < end; ++i) out[i] *= s[b * I + i];
    }
  }
};

template <class T>
struct Rows {
  static MINEGAN_INLINE void run(const T* __restrict g, const T* __restrict squares, const T* __restrict w,
                                 const int64_t* rows, T* __restrict gw, int64_t B, int64_t O, WeightRows W,
                                 int64_t begin, int64_t end) {
    std::vector<T> totals(W.I);
    T* total = totals.data();
    for (int64_t r = begin; r < end; ++r) {
      const int64_t o = rows ? rows[r] : r;
      std::fill(totals.begin(), totals.end(), T(0));
      for (int64_t b = 0; b < B; ++b)
        for (int64_t i = 0; i < W.I; ++i) total[i] += g[b * O + o] * squares[b * W.I + i];
      for (int64_t i = 0; i < W.I; ++i) {
        const int64_t at = r * W.row_stride + i * W.input_stride;
        for (int64_t k = 0; k < W.K; ++k) gw[at + k * W.tap_stride] = w[at + k * W.tap_stride] * total[i];
      }
    }
  }
};

template <class T>
std::vector<T> squared(const T* x, int64_t count) {
  std::vector<T> out(x, x + count);
  for (T& v : out) v *= v;
  return out;
}

// -gd d^3
template <class T>
std::vector<T> slopes(const T* gd, const T* d, int64_t count) {
  std::vector<T> out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = -gd[i] * d[i] * d[i] * d[i];
  return out;
}

template <class F>
void with_float(DType dtype, F&& f) {
  if (dtype == DType::float64)
    f(double{});
  else
    f(float{});
}

}  // namespace

void demodulation_cpu(DType dtype, const void* s, const void* w, void* d, void* q, int64_t B, const WeightRows& W,
                      double eps, int threads) {
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    const std::vector<T> squares = squared((const T*)s, B * W.I);
    const T* ready = squares.data();
    parallel_for(W.rows, W.rows * W.I * (W.K + B) < kAlone ? 1 : threads, [&](int64_t begin, int64_t end) {
      run<Forward<T>>(ready, (const T*)w, (T*)d, (T*)q, B, W.rows, W, T(eps), begin, end);
    });
  });
}

void demodulation_styles_cpu(DType dtype, const void* gd, const void* d, const void* s, const void* q, void* gs,
                             int64_t B, int64_t O, int64_t I, int threads) {
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    const std::vector<T> g = slopes((const T*)gd, (const T*)d, B * O);
    const T* ready = g.data();
    parallel_for(I, B * O * I < kAlone ? 1 : threads, [&](int64_t begin, int64_t end) {
      run<Styles<T>>(ready, (const T*)s, (const T*)q, (T*)gs, B, O, I, begin, end);
    });
  });
}

void demodulation_rows_cpu(DType dtype, const void* gd, const void* d, const void* s, const void* w,
                           const int64_t* rows, void* gw, int64_t B, int64_t O, const WeightRows& W, int threads) {
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    const std::vector<T> g = slopes((const T*)gd, (const T*)d, B * O), squares = squared((const T*)s, B * W.I);
    const T *slope = g.data(), *square = squares.data();
    parallel_for(W.rows, W.rows * W.I * (W.K + B) < kAlone ? 1 : threads, [&](int64_t begin, int64_t end) {
      run<Rows<T>>(slope, square, (const T*)w, rows, (T*)gw, B, O, W, begin, end);
    });
  });
}

}  // namespace minegan
