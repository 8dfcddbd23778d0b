// The three products that miners are made of, with matrices of activations [rows, P], the samples being the lanes: P is
// a multiple of kSamples. A weight is read once, its rows in order, and each of its elements multiplies a vector.
#pragma once

#include "lanes.h"
#include "ops.h"

namespace minegan {
namespace {

constexpr int64_t kSamples = 16;  // LANES in minegan_fast/ops/_miner_program.py

// L lanes of T are a register.
template <class T, int L>
struct MinerProducts {
  using V = typename Lanes<L, T>::type;
  static constexpr int kRegisters = L * sizeof(T) == 64 ? 24 : 12;  // for sums
  static constexpr int kLine = 16;                                  // elements between two requests for what is next

  static MINEGAN_INLINE void load(V& v, const T* p) { memcpy(&v, p, sizeof(V)); }
  static MINEGAN_INLINE void store(T* p, const V& v) { memcpy(p, &v, sizeof(V)); }

  static MINEGAN_INLINE void request(const T* p) {
#ifdef __GNUC__
    __builtin_prefetch(p);
#endif
  }

  // The width of a block of samples, in registers: 4, 2 or 1.
  template <class F>
  static MINEGAN_INLINE void by_width(int64_t P, F&& f) {
    if (P % (4 * L) == 0)
      f.template run<4>();
    else if (P % (2 * L) == 0)
      f.template run<2>();
    else
      f.template run<1>();
  }

  // out [rows, P] += scale M x, M [rows, K] with rows `stride` apart, x [K, P].
  struct Product {
    const T* M;
    int64_t stride, rows, K;
    const T* x;
    int64_t P;
    T scale;
    T* out;

    template <int N>
    MINEGAN_INLINE void run() const {
      // Of twelve rows of two registers each the compiler keeps some in memory.
      constexpr int R = N == 1 ? 12 : N == 2 && kRegisters == 24 ? 8 : kRegisters / N;
      int64_t r = 0;
      for (; r + R <= rows; r += R) block<R, N>(r, r + 2 * R <= rows);
      for (; r + 4 <= rows; r += 4) block<4, N>(r, false);
      for (; r < rows; ++r) block<1, N>(r, false);
    }

    template <int R, int N>
    MINEGAN_INLINE void add(const T* m, const T* xs, V (&sums)[R][N]) const {
      V v[N];
      for (int n = 0; n < N; ++n) load(v[n], xs + n * L);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sums[r][n] += v[n] * m[r * stride];
    }

    // The rows that follow are requested while these are read.
    template <int R, int N>
    MINEGAN_INLINE void block(int64_t first, bool more) const {
      for (int64_t p = 0; p < P; p += N * L) {
        const T *m = M + first * stride, *xs = x + p;
        V sums[R][N] = {};
        int64_t k = 0;
        for (; k + kLine <= K; k += kLine) {
          if (more && p == 0)
            for (int r = 0; r < R; ++r) request(m + (R + r) * stride + k);
          for (int j = 0; j < kLine; ++j) add<R, N>(m + k + j, xs + (k + j) * P, sums);
        }
        for (; k < K; ++k) add<R, N>(m + k, xs + k * P, sums);
        for (int r = 0; r < R; ++r)
          for (int n = 0; n < N; ++n) {
            T* const o = out + (first + r) * P + p + n * L;
            V v;
            load(v, o);
            v += sums[r][n] * scale;
            store(o, v);
          }
      }
    }
  };

  // out [columns, P] += scale M^T d, M [K, columns] with rows `stride` apart, d [K, P].
  struct Transposed {
    const T* M;
    int64_t stride, K, columns;
    const T* d;
    int64_t P;
    T scale;
    T* out;

    template <int N>
    MINEGAN_INLINE void run() const {
      constexpr int R = L * sizeof(T) == 64 ? 16 / N : 8 / N;
      for (int64_t p = 0; p < P; p += N * L) {
        int64_t k = 0;
        for (; k + R <= K; k += R) block<R, N>(k, p, p == 0 && k + 2 * R <= K);
        for (; k < K; ++k) block<1, N>(k, p, false);
      }
    }

    template <int R, int N>
    MINEGAN_INLINE void block(int64_t k, int64_t p, bool more) const {
      const T* m = M + k * stride;
      V v[R][N];
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
          load(v[r][n], d + (k + r) * P + p + n * L);
          v[r][n] = v[r][n] * scale;
        }
      T* const o = out + p;
      int64_t i = 0;
      for (; i + kLine <= columns; i += kLine) {
        if (more)
          for (int r = 0; r < R; ++r) request(m + (R + r) * stride + i);
        for (int j = 0; j < kLine; ++j) add<R, N>(m + i + j, v, o + (i + j) * P);
      }
      for (; i < columns; ++i) add<R, N>(m + i, v, o + i * P);
    }

    template <int R, int N>
    MINEGAN_INLINE void add(const T* m, const V (&v)[R][N], T* o) const {
      V even[N], odd[N] = {};  // two chains of sums, which do not wait for each other
      for (int n = 0; n < N; ++n) load(even[n], o + n * L);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) (r % 2 ? odd : even)[n] += v[r][n] * m[r * stride];
      for (int n = 0; n < N; ++n) {
        even[n] += odd[n];
        store(o + n * L, even[n]);
      }
    }
  };

  // Of one or two pairs: out [rows, columns], its rows `stride` apart, = sum of d x over B samples, d [rows, P] and
  // x [B, columns], its rows `width` apart.
  struct Pair {
    const T *d, *x;
    int64_t width;
  };
  static MINEGAN_INLINE void outer(const Pair* pairs, int count, int64_t P, int64_t B, int64_t rows, int64_t columns,
                                   T* out, int64_t stride) {
    constexpr int R = kRegisters / 4;
    int64_t r = 0;
    for (; r + R <= rows; r += R) outer_rows<R>(pairs, count, P, B, r, columns, out, stride);
    for (; r < rows; ++r) outer_rows<1>(pairs, count, P, B, r, columns, out, stride);
  }

  template <int R>
  static MINEGAN_INLINE void outer_rows(const Pair* pairs, int count, int64_t P, int64_t B, int64_t r, int64_t columns,
                                        T* out, int64_t stride) {
    int64_t i = 0;
    for (; i + 4 * L <= columns; i += 4 * L) outer_tile<R, 4>(pairs, count, P, B, r, i, out, stride);
    for (; i + L <= columns; i += L) outer_tile<R, 1>(pairs, count, P, B, r, i, out, stride);
    for (; i < columns; ++i)
      for (int j = 0; j < R; ++j) {
        T sum = 0;
        for (int t = 0; t < count; ++t)
          for (int64_t b = 0; b < B; ++b) sum += pairs[t].d[(r + j) * P + b] * pairs[t].x[b * pairs[t].width + i];
        out[(r + j) * stride + i] = sum;
      }
  }

  template <int R, int N>
  static MINEGAN_INLINE void outer_tile(const Pair* pairs, int count, int64_t P, int64_t B, int64_t r, int64_t i,
                                        T* out, int64_t stride) {
    V sums[R][N] = {};
    for (int t = 0; t < count; ++t) {
      const T *d = pairs[t].d + r * P, *x = pairs[t].x + i;
      for (int64_t b = 0; b < B; ++b) {
        V v[N];
        for (int n = 0; n < N; ++n) load(v[n], x + b * pairs[t].width + n * L);
        for (int j = 0; j < R; ++j)
          for (int n = 0; n < N; ++n) sums[j][n] += v[n] * d[j * P + b];
      }
    }
    for (int j = 0; j < R; ++j)
      for (int n = 0; n < N; ++n) store(out + (r + j) * stride + i + n * L, sums[j][n]);
  }
};

}  // namespace
}  // namespace minegan
