// row_gradient: equations and shapes in ops.h.
//
// With the positions q that x is read at as the inner dimension, dW = x [channels, q] G [q, rows and taps], where G
// holds for each row and tap the element of gy that x meets at q, or 0. x is large and is read as it lies; G is made
// block by block, small enough for the L2 cache. An x whose channels lie side by side has another kernel, that of
// row_gradient_last.h.
#include <algorithm>

#include "lanes.h"
#include "ops.h"
#include "row_gradient_last.h"

namespace minegan {
namespace {

constexpr int kChannels = 4;                // of x that a tile takes
constexpr int kNear = 8;                    // channels whose block of x stays in the L1 cache
constexpr int64_t kChunk = 256;             // channels whose sums stay in the L2 cache
constexpr int64_t kRowsTaps = 144;          // rows times taps that one G holds, about
constexpr int64_t kCached = 1 << 16;        // floats of G
constexpr int64_t kBlock[2] = {512, 2048};  // positions of a block: at least, at most
constexpr int64_t kInPlace = 256;  // positions a sample from which on blocks are cut at samples, x being read in place
constexpr int64_t kAlone = 1 << 22;  // below this many products a second thread costs more to start than it gives

MINEGAN_INLINE void prefetch(const float* p) {
#ifdef __GNUC__
  __builtin_prefetch(p);
#endif
}

// sums[c * N + n][l] += sum over i of x[c][i + l] g[n * pitch + i + l], i over the multiples of L below count. `ahead`
// is the distance to the elements of x that the next tile wants. All sums of a tile are in registers while i runs: an
// element of x serves N products, one of g kChannels.
template <int L, int N>
MINEGAN_INLINE void tile(const float* const* x, const float* g, int64_t pitch, int64_t count, float* sums,
                         int64_t ahead) {
  using V = typename Lanes<L>::type;
  V total[kChannels][N] = {};
  for (int64_t i = 0; i < count; i += L) {
    V xs[kChannels];
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) memcpy(&xs[c], x[c] + i, sizeof(V));
    if (ahead) {
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c) prefetch(x[c] + i + ahead);
    }
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) {
      V gs;
      memcpy(&gs, g + n * pitch + i, sizeof(V));
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c) total[c][n] += xs[c] * gs;
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) {
      V before;
      memcpy(&before, sums + (c * N + n) * L, sizeof(V));
      before += total[c][n];
      memcpy(sums + (c * N + n) * L, &before, sizeof(V));
    }
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
    // Of this line of the grid the elements from `first` to `last` lie within the tensor.
    int64_t first = 0, last = 0;
    if (i0 >= 0 && i0 < from.size[0] && i1 >= 0 && i1 < from.size[1]) {
      first = std::min(count, i2 < 0 ? (step - 1 - i2) / step : 0);
      last = std::max(first, i2 < from.size[2] ? std::min(count, (from.size[2] - i2 + step - 1) / step) : 0);
    }
    const float* line = from.data + b * from.batch + (i0 * from.size[1] + i1) * from.size[2] + i2;
    const int n = int(count), low = int(first), high = int(last), stride = int(step);
    if (step == 1)
      for (int j = 0; j < n; ++j) out[j] = j >= low && j < high ? line[j] : 0;
    else
      for (int j = 0; j < n; ++j) out[j] = j >= low && j < high ? line[j * stride] : 0;
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
template <int L>
struct RowGradient {
  static constexpr int kWide = L == 16 ? 6 : 3;  // as many columns of G as the registers hold
  using Buffer = std::vector<float>;

  static MINEGAN_INLINE void run(const float* x, const float* gy, float* dW, const Conv* shape, int64_t begin,
                                 int64_t end) {
    const Conv& s = *shape;
    const int64_t units = (s.C + kChannels - 1) / kChannels, taps = s.kernel[0] * s.kernel[1] * s.kernel[2];
    const int64_t rows = s.k / s.groups, most = std::max<int64_t>(1, kRowsTaps / taps);
    Buffer G, packed, sums;
    for (int64_t group = begin / units; group * units < end; ++group) {
      const int64_t first = (std::max(begin, group * units) - group * units) * kChannels;
      const int64_t last = std::min(s.C, (std::min(end, (group + 1) * units) - group * units) * kChannels);
      const float* group_x = x + group * s.C * s.x_channel;
      for (int64_t c0 = first; c0 < last; c0 += kChunk)
        for (int64_t r0 = 0; r0 < rows; r0 += most) {
          const int64_t c1 = std::min(last, c0 + kChunk), r1 = std::min(rows, r0 + most);
          const float* rows_gy = gy + (group * rows + r0) * s.y_channel();
          float* out = dW + (group * rows + r0) * s.C * taps;
          // With a stride, positions of x that differ modulo it meet different taps.
          const int64_t one[3] = {1, 1, 1}, *phases = s.transposed ? one : s.stride;
          int64_t phase[3];
          for (phase[0] = 0; phase[0] < phases[0]; ++phase[0])
            for (phase[1] = 0; phase[1] < phases[1]; ++phase[1])
              for (phase[2] = 0; phase[2] < phases[2]; ++phase[2])
                part(group_x, rows_gy, out, s, phase, c0, c1, r1 - r0, taps, G, packed, sums);
        }
    }
  }

  // dW [rows, c0 to c1, the taps that the positions of this phase meet].
  static MINEGAN_INLINE void part(const float* x, const float* gy, float* dW, const Conv& s, const int64_t* phase,
                                  int64_t c0, int64_t c1, int64_t rows, int64_t taps, Buffer& G, Buffer& packed,
                                  Buffer& sums) {
    // The grid: every stride-th position of x from `phase` on, of a transposed convolution every one.
    int64_t grid[3], positions = 1;
    bool in_place = true;
    Source xs{x, s.x_batch, {}, {}, {}}, gs{gy, s.k * s.y_channel(), {}, {}, {}};
    for (int i = 0; i < 3; ++i) {
      xs.size[i] = s.size[i], xs.offset[i] = phase[i], xs.step[i] = s.transposed ? 1 : s.stride[i];
      gs.size[i] = s.positions[i], gs.step[i] = s.transposed ? s.stride[i] : 1;
      grid[i] = (s.size[i] - phase[i] + xs.step[i] - 1) / xs.step[i];
      positions *= grid[i];
      in_place = in_place && xs.step[i] == 1;
    }
    // The taps that the grid meets, and how far from its position the element of gy lies that is met.
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
    if (met.empty()) return;
    const int64_t n_taps = int64_t(met.size()), columns = rows * n_taps, all = s.B * positions;
    int64_t x_grid[3] = {grid[0], grid[1], grid[2]};
    if (in_place) {  // then a plane is one long row
      x_grid[0] = x_grid[1] = xs.size[0] = xs.size[1] = 1;
      x_grid[2] = xs.size[2] = positions;
    }
    in_place = in_place && positions % L == 0 && positions >= kInPlace;
    // A block has as many positions as let G stay in the cache; a column of G is a row of gy and a tap.
    const int64_t block = std::min(std::max(kCached / columns, kBlock[0]), kBlock[1]) / L * L;
    const int64_t pitch = block + L;  // columns that a power of two apart would share their place in the cache
    const int64_t tiles = (c1 - c0 + kChannels - 1) / kChannels;
    std::vector<int64_t> place(columns);  // of a column in dW
    for (int64_t n = 0; n < columns; ++n) place[n] = n / n_taps * s.C * taps + met[n % n_taps].index;
    if (int64_t(G.size()) < columns * pitch) G.resize(columns * pitch);
    if (!in_place) packed.resize(kNear * pitch);
    sums.assign(tiles * kChannels * columns * L, 0.0f);
    for (int64_t p = 0, next; p < all; p = next) {
      next = std::min(all, p + block);
      if (in_place) next = std::min(next, (p / positions + 1) * positions);
      const int64_t count = (next - p + L - 1) / L * L;
      // G of this block, filled up with zeros to whole vectors.
      for (int64_t n = 0; n < columns; ++n) {
        Source one = gs;
        one.data += n / n_taps * s.y_channel();
        std::copy_n(met[n % n_taps].offset, 3, one.offset);
        read(one, grid, p, next, &G[n * pitch]);
        for (int64_t j = next - p; j < count; ++j) G[n * pitch + j] = 0;
      }
      // A few channels of x, in place or packed as G is, meet all columns of G while they are in the L1 cache.
      for (int64_t c = c0; c < c1; c += kNear) {
        const float* line[kNear];
        for (int j = 0; j < kNear; ++j) {
          const int64_t channel = std::min(c + j, c1 - 1);  // the last once more, for nothing, where there is no more
          if (in_place) {
            line[j] = x + p / positions * s.x_batch + channel * s.x_channel + p % positions;
          } else if (c + j < c1) {
            Source one = xs;
            one.data += channel * s.x_channel;
            line[j] = &packed[j * pitch];
            read(one, x_grid, p, next, &packed[j * pitch]);
            for (int64_t i = next - p; i < count; ++i) packed[j * pitch + i] = 0;
          } else {
            line[j] = line[j - 1];
          }
        }
        for (int64_t n = 0; n < columns; n += kWide)
          for (int64_t near = 0; near < kNear && c + near < c1; near += kChannels) {
            const int width = int(std::min<int64_t>(kWide, columns - n));
            float* at = &sums[((c - c0 + near) * columns + n * kChannels) * L];
            multiply(width, line + near, &G[n * pitch], pitch, count, at, in_place && n == 0 ? kNear * s.x_channel : 0);
          }
      }
    }
    // The lanes of every sum are added up, in the order in which the tiles left them.
    const float* lanes = sums.data();
    for (int64_t c = c0; c < c1; c += kChannels)
      for (int64_t first = 0; first < columns; first += kWide) {
        const int64_t width = std::min<int64_t>(kWide, columns - first);
        for (int64_t j = 0; j < kChannels; ++j)
          for (int64_t n = first; n < first + width; ++n, lanes += L) {
            if (c + j >= c1) continue;
            float sum[L];
            std::copy_n(lanes, L, sum);
#pragma GCC unroll 4
            for (int half = L / 2; half > 0; half /= 2)
              for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
            dW[place[n] + (c + j) * taps] = sum[0];
          }
      }
  }

  static MINEGAN_INLINE void multiply(int width, const float* const* x, const float* g, int64_t pitch, int64_t count,
                                      float* sums, int64_t ahead) {
    switch (width) {
      case 1:
        return tile<L, 1>(x, g, pitch, count, sums, ahead);
      case 2:
        return tile<L, 2>(x, g, pitch, count, sums, ahead);
      case 3:
        return tile<L, 3>(x, g, pitch, count, sums, ahead);
    }
    if constexpr (kWide == 6) {
      switch (width) {
        case 4:
          return tile<L, 4>(x, g, pitch, count, sums, ahead);
        case 5:
          return tile<L, 5>(x, g, pitch, count, sums, ahead);
        case 6:
          return tile<L, 6>(x, g, pitch, count, sums, ahead);
      }
    }
  }
};

}  // namespace

void row_gradient_cpu(const float* x, const float* gy, float* dW, const Conv& s, int threads) {
  const int64_t units = s.groups * ((s.C + kChannels - 1) / kChannels);
  const int64_t products =
      s.B * s.C * s.k * s.size[0] * s.size[1] * s.size[2] * s.kernel[0] * s.kernel[1] * s.kernel[2];
  parallel_for(units, products < kAlone ? 1 : threads, [&](int64_t begin, int64_t end) {
    const Conv* shape = &s;
#if MINEGAN_X86
    if (current_isa() == Isa::avx512) return run_avx512<RowGradient<16>>(x, gy, dW, shape, begin, end);
    if (current_isa() == Isa::avx2) return run_avx2<RowGradient<8>>(x, gy, dW, shape, begin, end);
#endif
    RowGradient<4>::run(x, gy, dW, shape, begin, end);
  });
}

void row_gradient_last_cpu(const float* x, const float* gy, const int64_t* rows, float* dW, const Conv& s,
                           const Strides& strides, int threads) {
  const int64_t positions = s.size[0] * s.size[1] * s.size[2], products = s.B * positions * s.C * s.k * s.taps();
  const int64_t lanes = current_isa() == Isa::avx512 ? 16 : current_isa() == Isa::avx2 ? 8 : 4;
  const int64_t blocks = (s.C + kUnit - 1) / kUnit, columns = (s.C + lanes - 1) / lanes * lanes;
  for (int64_t r = 0; rows && r < s.k; ++r)
    if (rows[r] < 0 || rows[r] >= strides.channels)
      throw std::out_of_range("rows must be from 0 to " + std::to_string(strides.channels - 1) +
                              ", gy's outputs, got " + std::to_string(rows[r]));
  LastWork work{x, gy, rows, s, strides, {}, 1, nullptr};
  for (int64_t i = 0; i < (s.transposed ? 1 : s.stride[0] * s.stride[1] * s.stride[2]); ++i) {
    const Phase phase(s, i);
    if (phase.taps.empty() || phase.positions() == 0) continue;
    work.parts.push_back({phase, Slabs(s, phase)});
    work.shares = std::max(work.shares, work.parts.back().slabs.count);
  }
  work.shares = std::min({work.shares, kShares, std::max<int64_t>(1, products / kShare)});
  const int64_t size = s.k * s.taps() * columns;
  std::vector<double> sums(work.shares * size);
  work.sums = sums.data();
  const int sharing = products < kAlone ? 1 : threads;
  parallel_for(work.shares * blocks, sharing, [&](int64_t begin, int64_t end) {
    const LastWork* const w = &work;
#if MINEGAN_X86
    if (lanes == 16) return run_avx512<RowGradientLast<16>>(w, begin, end);
    if (lanes == 8) return run_avx2<RowGradientLast<8>>(w, begin, end);
#endif
    RowGradientLast<4>::run(w, begin, end);
  });
  parallel_for(s.k, sharing, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t t = 0; t < s.taps(); ++t) {
        double* total = sums.data() + (r * s.taps() + t) * columns;
        for (int64_t share = 1; share < work.shares; ++share)
          for (int64_t i = 0; i < columns; ++i) total[i] += total[share * size + i];
        for (int64_t c = 0; c < s.C; ++c) {
          const int64_t first = c / lanes * lanes;
          dW[(r * s.C + c) * s.taps() + t] = float(total[c + first - std::min(first, s.C - lanes)]);
        }
      }
  });
}

}  // namespace minegan
