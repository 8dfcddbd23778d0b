// row_gradient: equations and shapes in ops.h. Host code alone: on a GPU the library and Triton are there.
//
// With the positions q that x is read at as the inner dimension, dW = x [channels, q] G [q, rows and taps], where G
// holds for each row and tap the element of gy that x meets at q, or 0. x is large and is read as it lies; G is made
// block by block, small enough for the L2 cache.
#include <algorithm>

#include "ops.h"

#ifdef __CUDACC__
#pragma nv_diag_suppress 1675  // GCC's pragma for unrolling, which nvcc hands on to it
#endif

namespace minegan {
namespace {

constexpr int kChannels = 4;          // of x that a tile takes
constexpr int64_t kRowsTaps = 144;    // rows times taps that one G holds, about
constexpr int64_t kBlock = 2048;      // positions of a block: its part of x stays in the L1 cache
constexpr int64_t kCached = 1 << 17;  // floats of G
constexpr int64_t kInPlace = 512;  // positions a sample from which on blocks are cut at samples, x being read in place
constexpr int64_t kAlone = 1 << 22;  // below this many products a second thread costs more to start than it gives

#ifdef __GNUC__
template <int L>
struct Lanes {
  typedef float type __attribute__((vector_size(L * 4)));
};
#else
template <int L>
struct Lanes {
  struct type {
    float lane[L];
    float& operator[](int j) { return lane[j]; }
  };
};
#endif

// sums[c * N + n] = sum over i of x[c][i] g[n * pitch + i]; count is a multiple of L.
template <int L, bool fused, int N>
MINEGAN_INLINE void tile(const float* const* x, const float* g, int64_t pitch, int64_t count, float* sums) {
  using V = typename Lanes<L>::type;
  V total[kChannels][N] = {};
  for (int64_t i = 0; i < count; i += L) {
    V xs[kChannels];
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) memcpy(&xs[c], x[c] + i, sizeof(V));
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) {
      V gs;
      memcpy(&gs, g + n * pitch + i, sizeof(V));
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c)
        for (int j = 0; j < L; ++j)
          total[c][n][j] = fused ? __builtin_fmaf(xs[c][j], gs[j], total[c][n][j]) : total[c][n][j] + xs[c][j] * gs[j];
    }
  }
  for (int c = 0; c < kChannels; ++c)
    for (int n = 0; n < N; ++n)
      for (int half = L / 2; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) total[c][n][j] += total[c][n][j + half];
  for (int c = 0; c < kChannels; ++c)
    for (int n = 0; n < N; ++n) sums[c * N + n] = total[c][n][0];
}

// A tensor read at the positions step u + offset of a grid of u; nothing lies outside of it but zeros.
struct Source {
  const float* data;
  int64_t batch;  // stride of the samples; planes are dense
  int64_t size[3], step[3], offset[3];
};

// out[j - begin] for j in [begin, end), j counting the grid's positions [B, *grid].
MINEGAN_INLINE void read(const Source& from, const int64_t* grid, int64_t begin, int64_t end, float* out) {
  int64_t u2 = begin % grid[2], u1 = begin / grid[2] % grid[1], u0 = begin / grid[2] / grid[1] % grid[0];
  int64_t b = begin / grid[2] / grid[1] / grid[0];
  const int64_t step = from.step[2];
  while (begin < end) {
    const int64_t count = std::min(end - begin, grid[2] - u2);
    const int64_t i0 = u0 * from.step[0] + from.offset[0], i1 = u1 * from.step[1] + from.offset[1];
    const int64_t i2 = u2 * step + from.offset[2];
    int64_t first = 0, last = 0;
    if (i0 >= 0 && i0 < from.size[0] && i1 >= 0 && i1 < from.size[1]) {
      first = std::min(count, i2 < 0 ? (step - 1 - i2) / step : 0);
      last = std::max(first, i2 < from.size[2] ? std::min(count, (from.size[2] - i2 + step - 1) / step) : 0);
    }
    for (int64_t j = 0; j < first; ++j) out[j] = 0;
    const float* line = from.data + b * from.batch + (i0 * from.size[1] + i1) * from.size[2] + i2;
    if (step == 1)
      for (int64_t j = first; j < last; ++j) out[j] = line[j];
    else
      for (int64_t j = first; j < last; ++j) out[j] = line[j * step];
    for (int64_t j = last; j < count; ++j) out[j] = 0;
    out += count;
    begin += count;
    u2 = 0;
    if (++u1 == grid[1]) {
      u1 = 0;
      if (++u0 == grid[0]) u0 = 0, ++b;
    }
  }
}

struct Tap {
  int64_t index, offset[3];
};

// The work of one thread: units of kChannels channels of a group.
template <int L, bool fused>
struct RowGradient {
  static constexpr int kWide = L == 16 ? 6 : 3;  // as many columns of G as the registers hold

  static MINEGAN_INLINE void run(const float* x, const float* gy, float* dW, const Convolution* shape, int64_t begin,
                                 int64_t end) {
    const Convolution& s = *shape;
    const int64_t units = (s.C + kChannels - 1) / kChannels, taps = s.kernel[0] * s.kernel[1] * s.kernel[2];
    const int64_t rows = s.k / s.groups, most = std::max<int64_t>(1, kRowsTaps / taps);
    std::vector<double> total;
    std::vector<float> G, packed;
    for (int64_t group = begin / units; group * units < end; ++group) {
      const int64_t c0 = (std::max(begin, group * units) - group * units) * kChannels;
      const int64_t c1 = std::min(s.C, (std::min(end, (group + 1) * units) - group * units) * kChannels);
      for (int64_t r0 = 0; r0 < rows; r0 += most) {
        const int64_t r1 = std::min(rows, r0 + most);
        total.assign((c1 - c0) * (r1 - r0) * taps, 0.0);
        // With a stride, positions of x that differ modulo it meet different taps.
        int64_t phase[3];
        const bool strided = !s.transposed;
        for (phase[0] = 0; phase[0] < (strided ? s.stride[0] : 1); ++phase[0])
          for (phase[1] = 0; phase[1] < (strided ? s.stride[1] : 1); ++phase[1])
            for (phase[2] = 0; phase[2] < (strided ? s.stride[2] : 1); ++phase[2])
              add(x + group * s.C * s.x_channel, gy + group * rows * s.y_channel(), s, phase, c0, c1, r0, r1, taps,
                  total.data(), G, packed);
        for (int64_t r = r0; r < r1; ++r)
          for (int64_t c = c0; c < c1; ++c)
            for (int64_t t = 0; t < taps; ++t)
              dW[((group * rows + r) * s.C + c) * taps + t] = float(total[((c - c0) * (r1 - r0) + r - r0) * taps + t]);
      }
    }
  }

  // Adds what the positions of one phase contribute to total [c1 - c0, r1 - r0, taps].
  static MINEGAN_INLINE void add(const float* x, const float* gy, const Convolution& s, const int64_t* phase,
                                 int64_t c0, int64_t c1, int64_t r0, int64_t r1, int64_t taps, double* total,
                                 std::vector<float>& G, std::vector<float>& packed) {
    int64_t grid[3], positions = 1;
    bool in_place = true;
    Source xs{x, s.x_batch, {}, {}, {}}, gs{gy, s.k * s.y_channel(), {}, {}, {}};
    for (int i = 0; i < 3; ++i) {
      xs.size[i] = s.size[i], xs.offset[i] = phase[i], xs.step[i] = s.transposed ? 1 : s.stride[i];
      gs.size[i] = s.positions[i], gs.step[i] = s.transposed ? s.stride[i] : 1;
      grid[i] = (s.size[i] - phase[i] + xs.step[i] - 1) / xs.step[i];
      positions *= std::max<int64_t>(0, grid[i]);
      in_place = in_place && xs.step[i] == 1;
    }
    std::vector<Tap> met;
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t d[3] = {t / s.kernel[2] / s.kernel[1], t / s.kernel[2] % s.kernel[1], t % s.kernel[2]};
      Tap tap{t, {}};
      bool meets = true;
      for (int i = 0; i < 3; ++i) {
        const int64_t distance = phase[i] + s.padding[i] - d[i] * s.dilation[i];
        meets = meets && (s.transposed || distance % s.stride[i] == 0);
        tap.offset[i] = s.transposed ? d[i] * s.dilation[i] - s.padding[i] : distance / s.stride[i];
      }
      if (meets) met.push_back(tap);
    }
    const int64_t columns = (r1 - r0) * int64_t(met.size()), all = s.B * positions;
    if (columns == 0 || all == 0) return;
    in_place = in_place && positions % L == 0 && positions >= kInPlace;
    const int64_t block = std::max<int64_t>(L, std::min(kBlock, kCached / columns) / L * L);
    const int64_t pitch = block + L;  // columns that a power of two apart would share their place in the cache
    if (int64_t(G.size()) < columns * pitch) G.resize(columns * pitch);
    if (!in_place) packed.resize(kChannels * pitch);
    for (int64_t p = 0, next; p < all; p = next) {
      next = std::min(all, p + block);
      if (in_place) next = std::min(next, (p / positions + 1) * positions);
      const int64_t count = (next - p + L - 1) / L * L;
      for (int64_t n = 0; n < columns; ++n) {
        Source one = gs;
        one.data += (r0 + n / int64_t(met.size())) * s.y_channel();
        std::copy_n(met[n % met.size()].offset, 3, one.offset);
        read(one, grid, p, next, &G[n * pitch]);
        for (int64_t j = next - p; j < count; ++j) G[n * pitch + j] = 0;
      }
      for (int64_t c = c0; c < c1; c += kChannels) {
        const float* line[kChannels];
        for (int j = 0; j < kChannels; ++j) {
          const int64_t channel = std::min(c + j, c1 - 1);  // the last once more, for nothing, where there is no more
          if (in_place) {
            line[j] = x + p / positions * s.x_batch + channel * s.x_channel + p % positions;
          } else {
            Source one = xs;
            one.data += channel * s.x_channel;
            line[j] = &packed[j * pitch];
            read(one, grid, p, next, &packed[j * pitch]);
            for (int64_t i = next - p; i < count; ++i) packed[j * pitch + i] = 0;
          }
        }
        for (int64_t n = 0; n < columns;) {
          const int width = int(std::min<int64_t>(kWide, columns - n));
          float sums[kChannels * kWide];
          multiply(width, line, &G[n * pitch], pitch, count, sums);
          for (int j = 0; j < std::min<int64_t>(kChannels, c1 - c); ++j)
            for (int i = 0; i < width; ++i) {
              const int64_t row = (n + i) / int64_t(met.size()), tap = met[(n + i) % met.size()].index;
              total[((c + j - c0) * (r1 - r0) + row) * taps + tap] += sums[j * width + i];
            }
          n += width;
        }
      }
    }
  }

  static MINEGAN_INLINE void multiply(int width, const float* const* x, const float* g, int64_t pitch, int64_t count,
                                      float* sums) {
    switch (width) {
      case 1:
        return tile<L, fused, 1>(x, g, pitch, count, sums);
      case 2:
        return tile<L, fused, 2>(x, g, pitch, count, sums);
      case 3:
        return tile<L, fused, 3>(x, g, pitch, count, sums);
    }
    if constexpr (kWide == 6) {
      switch (width) {
        case 4:
          return tile<L, fused, 4>(x, g, pitch, count, sums);
        case 5:
          return tile<L, fused, 5>(x, g, pitch, count, sums);
        case 6:
          return tile<L, fused, 6>(x, g, pitch, count, sums);
      }
    }
  }
};

}  // namespace

void row_gradient_cpu(const float* x, const float* gy, float* dW, const Convolution& s, int threads) {
  const int64_t units = s.groups * ((s.C + kChannels - 1) / kChannels);
  const int64_t products =
      s.B * s.C * s.k * s.size[0] * s.size[1] * s.size[2] * s.kernel[0] * s.kernel[1] * s.kernel[2];
  parallel_for(units, products < kAlone ? 1 : threads, [&](int64_t begin, int64_t end) {
    const Convolution* shape = &s;
#if MINEGAN_X86
    if (current_isa() == Isa::avx512) return run_avx512<RowGradient<16, true>>(x, gy, dW, shape, begin, end);
    if (current_isa() == Isa::avx2) return run_avx2<RowGradient<8, true>>(x, gy, dW, shape, begin, end);
#endif
    RowGradient<4, false>::run(x, gy, dW, shape, begin, end);
  });
}

}  // namespace minegan
