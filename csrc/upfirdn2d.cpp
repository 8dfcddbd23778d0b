// upfirdn2d: equations and shapes in ops.h.
#include <cmath>
#include <limits>

#include "ops.h"

namespace minegan {
namespace {

constexpr int64_t kBlockRows = 32;        // rows of a work unit
constexpr int64_t kBlockElements = 1024;  // of a row in a work unit: a few such rows fit the first cache
constexpr int64_t kBlockPixels = 16;      // and at least so many pixels, which share a margin of k - 1
constexpr int64_t kAlone = 1 << 16;       // below this many products a second thread costs more to start than it gives
constexpr int64_t kAhead = 4;             // rows that are prefetched ahead of their use
constexpr int64_t kLanes = 16;            // elements that a loop takes at a time
constexpr int64_t kPixel = 16;            // channels-last pixels of at least so many channels are filtered one by one

int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }
int64_t ceil_divide(int64_t a, int64_t b) { return -floor_divide(-a, b); }

// A filter as a sum of products of a column and a row: one product where it is separable, else one for each row of it.
// Turned as correlation wants it, the gain in the rows.
template <class A>
struct Filter {
  int64_t terms;
  std::vector<A> vertical, horizontal;  // [terms, kernel[0]], [terms, kernel[1]]

  Filter(const A* kernel, const Resampling& s, double gain) {
    const int64_t kh = s.kernel[0], kw = s.kernel[1];
    const auto at = [&](int64_t i, int64_t j) {
      const int64_t row = s.flip ? i : kh - 1 - i, column = s.flip ? j : kw - 1 - j;
      return s.separable ? double(kernel[row]) * kernel[column] : double(kernel[row * kw + column]);
    };
    int64_t pi = 0, pj = 0;
    for (int64_t i = 0; i < kh; ++i)
      for (int64_t j = 0; j < kw; ++j)
        if (std::abs(at(i, j)) > std::abs(at(pi, pj))) pi = i, pj = j;
    const double pivot = at(pi, pj), rounding = 4 * std::numeric_limits<A>::epsilon() * std::abs(pivot);
    bool product = true;
    for (int64_t i = 0; i < kh && !s.separable; ++i)
      for (int64_t j = 0; j < kw; ++j)
        product = product && std::abs(at(i, j) - (pivot == 0 ? 0 : at(i, pj) * at(pi, j) / pivot)) <= rounding;
    terms = product ? 1 : kh;
    vertical.resize(terms * kh);
    horizontal.resize(terms * kw);
    for (int64_t i = 0; i < kh; ++i) vertical[product ? i : i * kh + i] = product ? at(i, pj) / (pivot ? pivot : 1) : 1;
    for (int64_t r = 0; r < terms; ++r)
      for (int64_t j = 0; j < kw; ++j) horizontal[r * kw + j] = A(at(product ? pi : r, j) * gain);
  }
};

// Rows are too short, and too far from each other, for the prefetcher of the hardware.
template <class T, int for_write>
MINEGAN_INLINE void prefetch(const T* row, int64_t count) {
#ifdef __GNUC__
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(row + i, for_write);
#endif
}

// out[i] = (add ? out[i] : 0) + sum over t < N of weights[t] rows[t][i], for i in [begin, begin + count)
template <int N, bool add, class A, class In, class Out>
MINEGAN_INLINE void combine_run(const In* const* rows, const A* weights, Out* __restrict out, int64_t begin,
                                int64_t count) {
  const In *a = rows[0] + begin, *b = rows[N > 1 ? 1 : 0] + begin, *c = rows[N > 2 ? 2 : 0] + begin;
  const In* d = rows[N > 3 ? 3 : 0] + begin;
  out += begin;
  for (int64_t i = 0; i < count; ++i) {
    A sum = weights[0] * widen(a[i]);
    if (N > 1) sum += weights[1] * widen(b[i]);
    if (N > 2) sum += weights[2] * widen(c[i]);
    if (N > 3) sum += weights[3] * widen(d[i]);
    if (add) sum += widen(out[i]);
    out[i] = narrow<Out>(sum);
  }
}

// Whole runs of kLanes, the last of which may overlap the one before: rows are too short for a loop over single ones.
template <int N, bool add, class A, class In, class Out>
MINEGAN_INLINE void combine_few(const In* const* rows, const A* given, Out* __restrict out, int64_t count) {
  const A weights[4] = {given[0], given[N > 1 ? 1 : 0], given[N > 2 ? 2 : 0], given[N > 3 ? 3 : 0]};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) combine_run<N, add>(rows, weights, out, i, kLanes);
  if (i < count && i > 0 && !add)
    combine_run<N, add>(rows, weights, out, count - kLanes, kLanes);
  else
    combine_run<N, add>(rows, weights, out, i, count - i);
}

template <bool add, class A, class In, class Out>
MINEGAN_INLINE void combine_upto_4(const In* const* rows, const A* weights, int64_t taps, Out* out, int64_t count) {
  if (taps == 4) return combine_few<4, add>(rows, weights, out, count);
  if (taps == 3) return combine_few<3, add>(rows, weights, out, count);
  if (taps == 2) return combine_few<2, add>(rows, weights, out, count);
  if (taps == 1) return combine_few<1, add>(rows, weights, out, count);
  if (!add) std::fill(out, out + count, Out{});
}

// For any number of taps; of more than 4 the sums are kept in `out`, which therefore is of the wide type.
template <class A, class In>
MINEGAN_INLINE void combine(const In* const* rows, const A* weights, int64_t taps, bool add, A* out, int64_t count) {
  if (!add) combine_upto_4<false>(rows, weights, std::min<int64_t>(taps, 4), out, count);
  for (int64_t t = add ? 0 : 4; t < taps; t += 4)
    combine_upto_4<true>(rows + t, weights + t, std::min<int64_t>(taps - t, 4), out, count);
}

// out[(n parts + part) inner + c] = narrow(in[n inner + c]): one of `parts` interleaved sequences is put in its place.
template <class T>
MINEGAN_INLINE void interleave(const wide_t<T>* __restrict in, int64_t stride, int64_t parts, int64_t pixels,
                               int64_t inner, T* __restrict out) {
  if (inner == 1 && parts == 2) {
    const wide_t<T>* __restrict second = in + stride;
    int64_t n = 0;
    for (; n < pixels / 2; ++n) {
      out[2 * n] = narrow<T>(in[n]);
      out[2 * n + 1] = narrow<T>(second[n]);
    }
    if (pixels % 2) out[2 * n] = narrow<T>(in[n]);
    return;
  }
  for (int64_t w = 0; w < pixels; ++w)
    for (int64_t c = 0; c < inner; ++c) out[w * inner + c] = narrow<T>(in[w % parts * stride + w / parts * inner + c]);
}

// out[part stride + n inner + c] = in[(n parts + part) inner + c]
template <class A>
MINEGAN_INLINE void deinterleave(const A* __restrict in, int64_t parts, int64_t pixels, int64_t inner,
                                 A* __restrict out, int64_t stride) {
  if (inner == 1 && parts == 2) {
    A* __restrict second = out + stride;
    int64_t n = 0;
    for (; n < pixels / 2; ++n) {
      out[n] = in[2 * n];
      second[n] = in[2 * n + 1];
    }
    if (pixels % 2) out[n] = in[2 * n];
    return;
  }
  for (int64_t w = 0; w < pixels; ++w)
    for (int64_t c = 0; c < inner; ++c) out[w % parts * stride + w / parts * inner + c] = in[w * inner + c];
}

// Where an output sample lies on one axis: its first tap, the input that this meets, and how many taps meet one.
struct Position {
  int64_t tap, input, taps;
  Position(const Resampling& s, int axis, int64_t output) {
    const int64_t m = output * s.down[axis] - s.before[axis], u = s.up[axis];
    if (u == 1) {  // divisions would cost as much as a short row
      tap = 0, input = m, taps = s.kernel[axis];
      return;
    }
    input = ceil_divide(m, u);
    tap = input * u - m;
    taps = tap < s.kernel[axis] ? (s.kernel[axis] - tap + u - 1) / u : 0;
  }
};

// How the work is split: columns of `pixels` outputs in blocks of rows.
struct Blocks {
  int64_t pixels, columns, rows, units, width;  // width: input pixels that a column needs at most

  explicit Blocks(const Resampling& s) {
    const int64_t u = s.up[1];
    const int64_t least = std::max(kBlockPixels, kBlockElements / s.inner);
    columns = std::max<int64_t>(1, s.out[1] / least);
    pixels = ((s.out[1] + columns - 1) / columns + u - 1) / u * u;
    columns = (s.out[1] + pixels - 1) / pixels;
    rows = (s.out[0] + kBlockRows - 1) / kBlockRows;
    units = s.outer * columns * rows;
    width = (pixels * s.down[1] + s.kernel[1]) / u + 2;
  }
};

template <class T>
struct Units {
  using A = wide_t<T>;

  static MINEGAN_INLINE void run(const T* x, const Filter<A>* filter, T* y, const Resampling* shape,
                                 const Blocks* blocks, int64_t begin, int64_t end) {
    const Resampling& s = *shape;
    const int64_t inner = s.inner, U = s.up[1], D = s.down[1], kh = s.kernel[0], kw = s.kernel[1];
    const int64_t part = (blocks->width / D + 1) * inner, sums = (blocks->pixels / U + 1) * inner;
    std::vector<A> memory(blocks->width * inner + (D > 1 ? D * part : 0) + U * sums);
    A *const row = memory.data(), *const parts = row + blocks->width * inner,
             *const sum = parts + (D > 1 ? D * part : 0);
    // Work units filter a row of the buffer by `runs` sums of shifted rows: a phase of all pixels, or a pixel, each.
    const bool one_by_one = inner >= kPixel && (U > 1 || D > 1);
    const int64_t runs = one_by_one ? blocks->pixels : U, most = (kw + U - 1) / U;
    const bool direct = filter->terms == 1 && most <= 4 && (one_by_one || U == 1);
    std::vector<const T*> inputs(kh);
    std::vector<A> above(kh), across(filter->terms * runs * most);
    std::vector<const A*> shifted(runs * most);
    std::vector<int64_t> taps_of(runs);

    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t plane = unit / (blocks->columns * blocks->rows), column = unit / blocks->rows % blocks->columns;
      const int64_t w0 = column * blocks->pixels, pixels = std::min(blocks->pixels, s.out[1] - w0);
      const Position last(s, 1, w0 + pixels - 1);
      const int64_t low = Position(s, 1, w0).input, high = std::max(low + 1, last.input + last.taps);
      const int64_t from = std::min(std::max<int64_t>(low, 0), high), to = std::max(from, std::min(high, s.in[1]));
      std::fill(row, row + (from - low) * inner, A(0));
      std::fill(row + (to - low) * inner, row + (high - low) * inner, A(0));

      const int64_t active = one_by_one ? pixels : std::min(U, pixels);
      for (int64_t p = 0; p < active; ++p) {
        const Position at(s, 1, w0 + p);
        taps_of[p] = at.taps;
        for (int64_t t = 0; t < at.taps; ++t) {
          const int64_t i = at.input - low + t;
          shifted[p * most + t] = one_by_one || D == 1 ? row + i * inner : parts + i % D * part + i / D * inner;
          for (int64_t term = 0; term < filter->terms; ++term)
            across[(term * runs + p) * most + t] = filter->horizontal[term * kw + at.tap + t * U];
        }
      }

      const int64_t h0 = unit % blocks->rows * kBlockRows;
      for (int64_t h = h0; h < std::min(h0 + kBlockRows, s.out[0]); ++h) {
        T* out = y + ((plane * s.out[0] + h) * s.out[1] + w0) * inner;
        const Position vertical(s, 0, h);
        bool add = false;
        for (int64_t term = 0; term < filter->terms; ++term) {
          int64_t taps = 0;
          for (int64_t t = 0; t < vertical.taps; ++t) {
            const int64_t i = vertical.input + t;
            const A weight = filter->vertical[term * kh + vertical.tap + t * s.up[0]];
            if (i < 0 || i >= s.in[0] || weight == 0) continue;
            inputs[taps] = x + ((plane * s.in[0] + i) * s.in[1] + from) * inner;
            above[taps++] = weight;
          }
          if (taps == 0) continue;
          if (term == 0) {
            prefetch<T, 0>(inputs[taps - 1] + kAhead * s.in[1] * inner, (to - from) * inner);
            prefetch<T, 1>(out + kAhead * s.out[1] * inner, pixels * inner);
          }
          combine(inputs.data(), above.data(), taps, false, row + (from - low) * inner, (to - from) * inner);
          if (D > 1 && !one_by_one) deinterleave(row, D, high - low, inner, parts, part);
          for (int64_t p = 0; p < active; ++p) {
            const A* const* rows = shifted.data() + p * most;
            const A* weights = across.data() + (term * runs + p) * most;
            const int64_t count = one_by_one ? inner : U == 1 ? pixels * inner : (pixels - p + U - 1) / U * inner;
            if (direct)
              combine_upto_4<false>(rows, weights, taps_of[p], out + (one_by_one ? p * inner : 0), count);
            else
              combine(rows, weights, taps_of[p], add, sum + (one_by_one ? p % U * sums + p / U * inner : p * sums),
                      count);
          }
          add = true;
        }
        if (!add)
          std::fill(out, out + pixels * inner, T{});
        else if (!direct)
          interleave(sum, sums, U, pixels, inner, out);
      }
    }
  }
};

}  // namespace

void upfirdn2d_cpu(DType dtype, const void* x, const void* kernel, void* y, const Resampling& s, double gain,
                   int threads) {
  const Blocks blocks(s);
  const int64_t products = s.outer * s.out[0] * s.out[1] * s.inner * (s.kernel[0] + s.kernel[1]);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Filter<wide_t<T>> filter((const wide_t<T>*)kernel, s, gain);
    parallel_for(blocks.units, products < kAlone ? 1 : threads, [&](int64_t begin, int64_t end) {
      run<Units<T>>((const T*)x, &filter, (T*)y, &s, &blocks, begin, end);
    });
  });
}

}  // namespace minegan
