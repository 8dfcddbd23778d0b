// penalty: equations and shapes in ops.h.
#include <cmath>
#include <type_traits>

#include "ops.h"

namespace minegan {
namespace {

constexpr int kFloats = 64;  // the same of float, and how many elements they add up before a double takes over
constexpr int64_t kFloatRun = 2048;
constexpr int kLanes = 32;           // running sums of a share: the same on every instruction set, hence the same bits
constexpr int64_t kShare = 1 << 14;  // elements of a sample that are added up at a time
constexpr int64_t kAlone = 1 << 17;  // below this many elements a second thread costs more to start than it gives

int64_t shares(int64_t length) { return (length + kShare - 1) / kShare; }

// In double: neither the square of a small gradient underflows nor that of a large one overflows.
template <class T>
struct Squares {
  static MINEGAN_INLINE void run(const T* __restrict g, int64_t count, double* __restrict sum) {
    double lanes[kLanes] = {};
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
      for (int j = 0; j < kLanes; ++j) {
        const double v = widen(g[i + j]);
        lanes[j] += v * v;
      }
    for (int64_t i = whole; i < count; ++i) {
      const double v = widen(g[i]);
      lanes[i - whole] += v * v;
    }
    *sum = 0;
    for (const double lane : lanes) *sum += lane;
  }
};

// In float, which is twice as fast, for a share whose squares neither vanish nor overflow there: its sum tells.
template <class T>
struct FloatSquares {
  static MINEGAN_INLINE void run(const T* __restrict g, int64_t count, double* __restrict sum) {
    double total = 0;
    for (int64_t first = 0; first < count; first += kFloatRun) {
      const int64_t end = std::min(first + kFloatRun, count), whole = first + (end - first) / kFloats * kFloats;
      float lanes[kFloats] = {}, rest = 0;
      for (int64_t i = first; i < whole; i += kFloats)
        for (int j = 0; j < kFloats; ++j) {
          const float v = widen(g[i + j]);
          lanes[j] += v * v;
        }
      for (int64_t i = whole; i < end; ++i) rest += widen(g[i]) * widen(g[i]);
      for (const float lane : lanes) total += lane;
      total += rest;
    }
    *sum = total;
  }
};

template <class T>
void squares(const T* g, int64_t count, double* sum) {
  if constexpr (!std::is_same_v<T, double>) {
    run<FloatSquares<T>>(g, count, sum);
    if (*sum > 1e-20 && *sum < 1e30) return;
  }
  run<Squares<T>>(g, count, sum);
}

template <class T>
struct Scaled {
  static MINEGAN_INLINE void run(const T* __restrict g, T* __restrict dg, int64_t count, wide_t<T> scale) {
    for (int64_t i = 0; i < count; ++i) dg[i] = narrow<T>(scale * widen(g[i]));
  }
};

// f(sample, begin, end, share) for the shares of all samples.
template <class F>
void for_shares(const Samples& s, int threads, const F& f) {
  const int64_t each = shares(s.length);
  parallel_for(s.count * each, s.count * s.length < kAlone ? 1 : threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % each * kShare;
      f(i / each, begin, std::min(begin + kShare, s.length), i);
    }
  });
}

template <class R>
void finish(const std::vector<double>& sums, const Samples& s, const Norm& norm, const R* mean, R* penalty, R* lengths,
            R* scale, R* new_mean) {
  const int64_t each = shares(s.length);
  std::vector<double> norms(s.count);
  double total = 0, squares = 0;
  for (int64_t b = 0; b < s.count; ++b) {
    double q = 0;
    for (int64_t i = 0; i < each; ++i) q += sums[b * each + i];
    squares += q;
    norms[b] = std::sqrt(q / norm.parts);
    total += norms[b];
  }
  const double count = double(s.count), from = mean ? double(*mean) : norm.center;
  const double a = from + norm.decay * (total / count - from), off = total / count - a;
  double result = 0;
  for (int64_t b = 0; b < s.count; ++b) {
    const double r = norms[b], d = r - a;
    result += d * d;
    const double slope = 2 / count * (d - norm.decay * off);
    lengths[b] = R(r);
    scale[b] = R(norm.squared ? 2 / count : r > 0 ? slope / (norm.parts * r) : 0);
  }
  *penalty = R((norm.squared ? squares : result) / count);
  *new_mean = R(a);
}

}  // namespace

void penalty_cpu(DType dtype, const void* g, const void* mean, void* penalty, void* lengths, void* scale,
                 void* new_mean, const Samples& s, const Norm& norm, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using R = wide_t<T>;
    std::vector<double> sums(s.count * shares(s.length));
    for_shares(s, threads, [&](int64_t b, int64_t begin, int64_t end, int64_t share) {
      squares((const T*)g + b * s.stride + begin, end - begin, &sums[share]);
    });
    finish<R>(sums, s, norm, (const R*)mean, (R*)penalty, (R*)lengths, (R*)scale, (R*)new_mean);
  });
}

void penalty_backward_cpu(DType dtype, const void* g, const void* scale, const void* dpenalty, void* dg,
                          const Samples& s, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using R = wide_t<T>;
    for_shares(s, threads, [&](int64_t b, int64_t begin, int64_t end, int64_t) {
      run<Scaled<T>>((const T*)g + b * s.stride + begin, (T*)dg + b * s.out_stride + begin, end - begin,
                     R(((const R*)scale)[b] * *(const R*)dpenalty));
    });
  });
}

void penalty_philox_cpu(uint64_t seed, uint64_t offset, float* alpha, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t c[4] = {uint32_t(i), uint32_t(offset), uint32_t(offset >> 32), 0},
             k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p1 = uint64_t(c[2]) * 0xCD9E8D57u;
      const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k[0], uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k[1],
                                uint32_t(p0)};
      std::copy(next, next + 4, c);
      k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
    }
    const uint32_t magnitude = c[0] >> 31 ? ~c[0] : c[0];
    alpha[i] = float(magnitude) * 4.6566127342e-10f;
  }
}

}  // namespace minegan
