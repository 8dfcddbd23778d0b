// manhattan: equations and shapes in ops.h.
#include <algorithm>

#include "ops.h"

namespace minegan {
namespace {

constexpr int kLanes = 64;           // running sums of a pair
constexpr int64_t kBlock = 16;       // rows of q that stay in the cache while all of p pass by
constexpr int64_t kColumns = 64;     // dimensions of a row that are summed in registers
constexpr int64_t kAlone = 1 << 18;  // below this many elements a second thread costs more to start than it gives

MINEGAN_HD float sign_of(float v) { return (v > 0 ? 1.0f : 0.0f) - (v < 0 ? 1.0f : 0.0f); }

template <bool slopes>
MINEGAN_HD float term(float p, float q, float hp, float hq) {
  const float v = p - q;
  return slopes ? sign_of(v) * (hp - hq) : (v < 0 ? -v : v);
}

template <bool slopes>
struct Pairs {
  static MINEGAN_INLINE void run(const float* __restrict p, const float* __restrict q, const float* __restrict hp,
                                 const float* __restrict hq, float* __restrict out, int64_t begin, int64_t end,
                                 int64_t c, int64_t D) {
    const int64_t whole = D / kLanes * kLanes;
    for (int64_t first = 0; first < c; first += kBlock) {
      const int64_t last = std::min(first + kBlock, c);
      for (int64_t i = begin; i < end; ++i) {
        const float *a = p + i * D, *ha = hp + i * D;
        for (int64_t j = first; j < last; ++j) {
          const float *b = q + j * D, *hb = hq + j * D;
          float lanes[kLanes] = {};
          for (int64_t d = 0; d < whole; d += kLanes)
            for (int l = 0; l < kLanes; ++l)
              lanes[l] += term<slopes>(a[d + l], b[d + l], slopes ? ha[d + l] : 0, slopes ? hb[d + l] : 0);
          for (int64_t d = whole; d < D; ++d)
            lanes[d - whole] += term<slopes>(a[d], b[d], slopes ? ha[d] : 0, slopes ? hb[d] : 0);
          double sum = 0;
          for (const float lane : lanes) sum += lane;
          out[i * c + j] = float(sum);
        }
      }
    }
  }
};

struct Signs {
  static MINEGAN_INLINE void run(const float* __restrict A, const float* __restrict p, const float* __restrict q,
                                 float* __restrict out, int64_t begin, int64_t end, int64_t c, int64_t D) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t d = 0; d < D; ++d) out[i * D + d] = 0;
    for (int64_t first = 0; first < c; first += 4 * kBlock) {
      const int64_t last = std::min(first + 4 * kBlock, c);
      for (int64_t d0 = 0; d0 < D; d0 += kColumns) {
        const int64_t width = std::min(kColumns, D - d0);
        for (int64_t i = begin; i < end; ++i) {
          float a[kColumns] = {}, lanes[kColumns] = {};
          for (int64_t d = 0; d < width; ++d) a[d] = p[i * D + d0 + d];
          if (width == kColumns) {
            for (int64_t j = first; j < last; ++j) {
              const float* b = q + j * D + d0;
              const float w = A[i * c + j];
              for (int l = 0; l < kColumns; ++l) lanes[l] += (b[l] < a[l] ? w : 0.0f) - (a[l] < b[l] ? w : 0.0f);
            }
          } else {
            for (int64_t j = first; j < last; ++j) {
              const float* b = q + j * D + d0;
              const float w = A[i * c + j];
              for (int64_t l = 0; l < width; ++l) lanes[l] += (b[l] < a[l] ? w : 0.0f) - (a[l] < b[l] ? w : 0.0f);
            }
          }
          for (int64_t d = 0; d < width; ++d) out[i * D + d0 + d] += lanes[d];
        }
      }
    }
  }
};

int threads_for(int64_t r, int64_t c, int64_t D, int threads) { return r * c * D < kAlone ? 1 : threads; }

}  // namespace

void manhattan_distance_cpu(const float* p, const float* q, float* t, int64_t r, int64_t c, int64_t D, int threads) {
  parallel_for(r, threads_for(r, c, D, threads),
               [&](int64_t begin, int64_t end) { run<Pairs<false>>(p, q, p, q, t, begin, end, c, D); });
}

void manhattan_slopes_cpu(const float* p, const float* q, const float* hp, const float* hq, float* s, int64_t r,
                          int64_t c, int64_t D, int threads) {
  parallel_for(r, threads_for(r, c, D, threads),
               [&](int64_t begin, int64_t end) { run<Pairs<true>>(p, q, hp, hq, s, begin, end, c, D); });
}

void manhattan_signs_cpu(const float* A, const float* p, const float* q, float* out, int64_t r, int64_t c, int64_t D,
                         int threads) {
  parallel_for(r, threads_for(r, c, D, threads),
               [&](int64_t begin, int64_t end) { run<Signs>(A, p, q, out, begin, end, c, D); });
}

}  // namespace minegan
