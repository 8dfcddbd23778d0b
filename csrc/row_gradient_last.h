// row_gradient of an x whose channels lie side by side: equations and shapes in ops.h.
//
// Channels are the lanes: at each position of x, for each row and tap, one element of gy multiplies the channels there.
// The wanted rows of gy, a small part that is strewn over all of it, are copied first, slab by slab, with zeros around
// them, so that no tap asks where the image ends.
#pragma once

#include <algorithm>

#include "lanes.h"
#include "ops.h"

namespace minegan {
namespace {

constexpr int64_t kUnit = 256;       // channels of a unit of work, whose sums stay in the L2 cache
constexpr int64_t kSlab = 128;       // positions, about, whose sum is in float: that of more would lose digits
constexpr int64_t kShares = 16;      // at most: the more, the more sums there are to add up
constexpr int64_t kShare = 1 << 21;  // products of a share, at least

// With a stride, positions of x that differ modulo it meet different taps: a phase is those that do not. Position u of
// its grid reads x at u x_step + phase and, for a tap, gy at u y_step + offset.
struct Phase {
  struct Tap {
    int64_t index, offset[3];
  };
  int64_t phase[3], grid[3], x_step[3], y_step[3], least[3], most[3];  // least, most: of the taps' offsets
  std::vector<Tap> taps;

  Phase(const Conv& s, int64_t number) {
    for (int i = 2; i >= 0; --i) {
      x_step[i] = s.transposed ? 1 : s.stride[i];
      y_step[i] = s.transposed ? s.stride[i] : 1;
      phase[i] = number % x_step[i];
      number /= x_step[i];
      grid[i] = (s.size[i] - phase[i] + x_step[i] - 1) / x_step[i];
    }
    for (int64_t t = 0; t < s.taps(); ++t) {
      const int64_t d[3] = {t / s.kernel[2] / s.kernel[1], t / s.kernel[2] % s.kernel[1], t % s.kernel[2]};
      Tap tap{t, {}};
      bool meets = true;
      for (int i = 0; i < 3; ++i) {
        const int64_t distance = phase[i] + s.padding[i] - d[i] * s.dilation[i];
        meets = meets && distance % x_step[i] == 0;
        tap.offset[i] = s.transposed ? -distance : distance / x_step[i];
      }
      if (!meets) continue;
      for (int i = 0; i < 3; ++i) {
        least[i] = taps.empty() ? tap.offset[i] : std::min(least[i], tap.offset[i]);
        most[i] = taps.empty() ? tap.offset[i] : std::max(most[i], tap.offset[i]);
      }
      taps.push_back(tap);
    }
  }

  int64_t positions() const { return grid[0] * grid[1] * grid[2]; }
};

// How a phase's positions are cut: into blocks of samples or, where one sample is too large, along its outermost axis.
struct Slabs {
  int axis = -1;  // that is cut; -1: the samples
  int64_t size, of_a_sample = 1, count;

  Slabs(const Conv& s, const Phase& phase) {
    int64_t length = s.B, positions = phase.positions();
    if (positions > kSlab) {
      axis = phase.grid[0] > 1 ? 0 : phase.grid[1] > 1 ? 1 : 2;
      length = phase.grid[axis];
      positions /= length;
    }
    const int64_t parts = (length * positions + kSlab - 1) / kSlab;
    size = (length + parts - 1) / parts;
    count = (length + size - 1) / size;
    if (axis >= 0) {
      of_a_sample = count;
      count *= s.B;
    }
  }
};

struct Part {
  Phase phase;
  Slabs slabs;
};

struct LastWork {
  const float *x, *gy;
  const int64_t* rows;  // null: all
  Conv s;
  Strides strides;
  std::vector<Part> parts;
  int64_t shares;  // of the slabs, each with sums of its own
  double* sums;    // [shares, k, taps, vectors of channels, lanes]
};

// The work of one thread: units of a share of the slabs and kUnit channels.
template <int L>
struct RowGradientLast {
  using V = typename Lanes<L>::type;
  static constexpr int kRows = 4, kTaps = 3;       // of a tile, at most
  static constexpr int kSums = L == 16 ? 24 : 12;  // of a tile: registers

  struct Line {
    int64_t x, gy;  // where it begins
  };
  struct Slab {
    int64_t b0, b1, width, origin[3], extent[3];  // origin, extent: of what is copied of gy
    std::vector<Line> lines;
    std::vector<float> gy;  // [b1 - b0, *extent, rows of a tile]
  };

  static int64_t vectors(const Conv& s) { return (s.C + L - 1) / L; }

  static MINEGAN_INLINE void run(const LastWork* work, int64_t begin, int64_t end) {
    const LastWork& w = *work;
    const int64_t all = vectors(w.s), blocks = (w.s.k + kRows - 1) / kRows;
    Slab slab;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t share = unit % w.shares, v0 = unit / w.shares * (kUnit / L), v1 = std::min(v0 + kUnit / L, all);
      double* sums = w.sums + share * w.s.k * w.s.taps() * all * L;
      for (const Part& part : w.parts) {
        const int64_t first = part.slabs.count * share / w.shares, last = part.slabs.count * (share + 1) / w.shares;
        for (int64_t n = first; n < last; ++n) {
          place(w, part.phase, part.slabs, n, slab);
          for (int64_t block = 0; block < blocks; ++block) {
            const int64_t r0 = w.s.k * block / blocks, r1 = w.s.k * (block + 1) / blocks;
            double* at = sums + r0 * w.s.taps() * all * L;
            if (r1 - r0 == 1) add<1>(w, part.phase, r0, v0, v1, slab, at);
            if (r1 - r0 == 2) add<2>(w, part.phase, r0, v0, v1, slab, at);
            if (r1 - r0 == 3) add<3>(w, part.phase, r0, v0, v1, slab, at);
            if (r1 - r0 == 4) add<4>(w, part.phase, r0, v0, v1, slab, at);
          }
        }
      }
    }
  }

  static void place(const LastWork& w, const Phase& phase, const Slabs& slabs, int64_t n, Slab& slab) {
    int64_t first[3] = {}, count[3];
    std::copy_n(phase.grid, 3, count);
    if (slabs.axis < 0) {
      slab.b0 = n * slabs.size;
      slab.b1 = std::min(w.s.B, slab.b0 + slabs.size);
    } else {
      slab.b0 = n / slabs.of_a_sample;
      slab.b1 = slab.b0 + 1;
      first[slabs.axis] = n % slabs.of_a_sample * slabs.size;
      count[slabs.axis] = std::min(slabs.size, phase.grid[slabs.axis] - first[slabs.axis]);
    }
    int64_t floats = (slab.b1 - slab.b0) * kRows;
    for (int i = 0; i < 3; ++i) {
      slab.origin[i] = first[i] * phase.y_step[i] + phase.least[i];
      slab.extent[i] = (count[i] - 1) * phase.y_step[i] + phase.most[i] - phase.least[i] + 1;
      floats *= slab.extent[i];
    }
    if (int64_t(slab.gy.size()) < floats) slab.gy.resize(floats);
    slab.width = count[2];
    slab.lines.clear();
    for (int64_t b = slab.b0; b < slab.b1; ++b)
      for (int64_t u0 = 0; u0 < count[0]; ++u0)
        for (int64_t u1 = 0; u1 < count[1]; ++u1) {
          const int64_t u[3] = {u0, u1, 0};
          Line line{b * w.strides.x[0], b - slab.b0};
          for (int i = 0; i < 3; ++i) {
            line.x += ((first[i] + u[i]) * phase.x_step[i] + phase.phase[i]) * w.strides.x[i + 1];
            line.gy = line.gy * slab.extent[i] + u[i] * phase.y_step[i];
          }
          slab.lines.push_back(line);
        }
  }

  // sums [R, taps, vectors, L] += those of the slab, for R rows from r0 on.
  template <int R>
  static MINEGAN_INLINE void add(const LastWork& w, const Phase& phase, int64_t r0, int64_t v0, int64_t v1, Slab& slab,
                                 double* sums) {
    copy<R>(w, r0, slab);
    const int64_t taps = int64_t(phase.taps.size()), groups = (taps + kTaps - 1) / kTaps;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = taps * group / groups, count = taps * (group + 1) / groups - first;
      const Phase::Tap* at = &phase.taps[first];
      if (count == 1) multiply<R, 1>(w, phase, at, v0, v1, slab, sums);
      if (count == 2) multiply<R, 2>(w, phase, at, v0, v1, slab, sums);
      if (count == 3) multiply<R, 3>(w, phase, at, v0, v1, slab, sums);
    }
  }

  template <int R>
  static MINEGAN_INLINE void copy(const LastWork& w, int64_t r0, Slab& slab) {
    const int64_t *y = w.strides.gy, *size = w.s.positions;
    const int64_t extent = slab.extent[2], origin = slab.origin[2];
    const int64_t first = std::min(std::max<int64_t>(0, -origin), extent);
    const int64_t last = std::max(first, std::min(extent, size[2] - origin));
    float* out = slab.gy.data();
    for (int64_t b = slab.b0; b < slab.b1; ++b)
      for (int64_t i0 = slab.origin[0]; i0 < slab.origin[0] + slab.extent[0]; ++i0)
        for (int64_t i1 = slab.origin[1]; i1 < slab.origin[1] + slab.extent[1]; ++i1, out += extent * R) {
          if (i0 < 0 || i0 >= size[0] || i1 < 0 || i1 >= size[1]) {
            std::fill(out, out + extent * R, 0.0f);
            continue;
          }
          const float* line = w.gy + b * y[0] + i0 * y[2] + i1 * y[3] + (origin + first) * y[4];
          const float* from[R];
          for (int r = 0; r < R; ++r) from[r] = line + (w.rows ? w.rows[r0 + r] : r0 + r) * y[1];
          std::fill(out, out + first * R, 0.0f);
          for (int64_t i = first; i < last; ++i)
            for (int r = 0; r < R; ++r) out[i * R + r] = from[r][(i - first) * y[4]];
          std::fill(out + last * R, out + extent * R, 0.0f);
        }
  }

  template <int R, int T>
  static MINEGAN_INLINE void multiply(const LastWork& w, const Phase& phase, const Phase::Tap* taps, int64_t v0,
                                      int64_t v1, const Slab& slab, double* sums) {
    constexpr int most = kSums / (R * T);  // vectors of a tile
    const int64_t x_step = phase.x_step[2] * w.strides.x[3], y_step = phase.y_step[2] * R;
    const int64_t column = vectors(w.s) * L, row = w.s.taps() * column;
    const float* gy[T];
    double* to[T];
    for (int t = 0; t < T; ++t) {
      int64_t offset = 0;
      for (int i = 0; i < 3; ++i) offset = offset * slab.extent[i] + taps[t].offset[i] - phase.least[i];
      gy[t] = slab.gy.data() + offset * R;
      to[t] = sums + taps[t].index * column;
    }
    for (int64_t v = v0; v < v1;) {
      const int64_t whole = std::min(v1, w.s.C / L) - v;
      // The last vector is a whole one, too: what it shares with the one before is not read from its sums.
      const float* x = w.x + std::min(v * L, w.s.C - L);
      if constexpr (most >= 8)
        if (whole >= 8) {
          tile<R, T, 8>(x, x_step, gy, y_step, slab, v * L, to, row);
          v += 8;
          continue;
        }
      if constexpr (most >= 4)
        if (whole >= 4) {
          tile<R, T, 4>(x, x_step, gy, y_step, slab, v * L, to, row);
          v += 4;
          continue;
        }
      if constexpr (most >= 2)
        if (whole >= 2) {
          tile<R, T, 2>(x, x_step, gy, y_step, slab, v * L, to, row);
          v += 2;
          continue;
        }
      tile<R, T, 1>(x, x_step, gy, y_step, slab, v * L, to, row);
      v += 1;
    }
  }

  // N vectors of channels from x on. All sums of a tile are in registers while the positions run.
  template <int R, int T, int N>
  static MINEGAN_INLINE void tile(const float* x, int64_t x_step, const float* const* gy, int64_t y_step,
                                  const Slab& slab, int64_t place, double* const* to, int64_t row) {
    V total[R][T][N] = {};
    for (const Line& line : slab.lines) {
      const float *xs = x + line.x, *gs[T];
      for (int t = 0; t < T; ++t) gs[t] = gy[t] + line.gy * R;
      for (int64_t u = 0; u < slab.width; ++u) {
        V lanes[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) memcpy(&lanes[n], xs + n * L, sizeof(V));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
          for (int t = 0; t < T; ++t) {
            const float one = gs[t][u * y_step + r];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) total[r][t][n] += lanes[n] * one;
          }
        xs += x_step;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) {
        float sum[N * L];
        memcpy(sum, total[r][t], sizeof(sum));
        for (int i = 0; i < N * L; ++i) to[t][r * row + place + i] += sum[i];
      }
  }
};

}  // namespace
}  // namespace minegan
