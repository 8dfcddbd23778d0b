// mmd_groups: equations and shapes in ops.h.
#include <algorithm>
#include <numeric>
#include <vector>

#include "mmd_rows.h"

namespace minegan {
namespace {

constexpr int kFew = 32;  // as kLanes: a row may be as short as a batch

struct Shape {
  int64_t N, M, stride;
  double within, across;
};

MINEGAN_INLINE double sum_of(const float* values, int64_t count) {
  double sums[kFew] = {};
  const int64_t whole = count / kFew * kFew;
  for (int64_t first = 0; first < whole; first += kFew)
    for (int l = 0; l < kFew; ++l) sums[l] += values[first + l];
  for (int64_t i = whole; i < count; ++i) sums[i - whole] += values[i];
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// Row i of a group; `squares` are the |x|². Returns its total.
template <int order>
struct GroupRow {
  using Pairs = RowLoop<Kernel::gaussian, order, kFew>;

  static MINEGAN_INLINE void run(const MmdGroup* group, const Shape* shape, const float* squares, int64_t i,
                                 double* total) {
    const int64_t N = shape->N, M = shape->M;
    // RowLoop makes 2 weight f' of a weight: of the pairs within x, which count from both sides, that is half of it.
    const double w = shape->within / group->count, v = shape->across / group->count;
    MmdTile tile{};
    tile.p = tile.q = group->x;
    tile.op = tile.oq = squares;
    tile.numbers = group->numbers, tile.squarings = group->squarings, tile.count = group->count;
    tile.t = group->xx, tile.rows = tile.columns = N, tile.D = group->D, tile.stride = shape->stride;
    tile.weight = -2 * w;
    const double within = Pairs::run(tile, i) / -2 - w * group->count;  // without j = i
    tile.q = group->y, tile.oq = group->norms, tile.t = group->xy, tile.columns = M, tile.weight = -v;
    *total = within - Pairs::run(tile, i) + 0 * squares[i];  // NaN where x is not finite
    if (order == 1) {
      float *xx = group->xx + i * N, *xy = group->xy + i * M;
      xx[i] = 0;
      xx[i] = float(-sum_of(xx, N) - sum_of(xy, M));
    }
  }
};

}  // namespace

void mmd_groups_cpu(const MmdGroup* groups, int64_t count, int64_t N, int64_t M, int64_t stride, double within,
                    double across, bool gradient, double* sums, int threads) {
  const Shape shape{N, M, stride, within, across};
  std::vector<float> squares(count * N);
  std::vector<double> totals(count * N);
  for (int64_t g = 0; g < count; ++g)
    for (int64_t i = 0; i < N; ++i) squares[g * N + i] = groups[g].xx[i * N + i];
  const int used = count * N * (N + M) < kAlone / 2 ? 1 : threads;
  const int64_t share = std::max<int64_t>(1, count * N / (8 * used));
  std::atomic<int64_t> next{0};
  parallel_for(used, used, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(share)) < count * N;)
      for (int64_t row = begin; row < std::min(begin + share, count * N); ++row) {
        const float* own = &squares[row / N * N];
        if (gradient)
          run<GroupRow<1>>(groups + row / N, &shape, own, row % N, &totals[row]);
        else
          run<GroupRow<0>>(groups + row / N, &shape, own, row % N, &totals[row]);
      }
  });
  for (int64_t g = 0; g < count; ++g) sums[g] = std::accumulate(&totals[g * N], &totals[g * N] + N, 0.0);
}

}  // namespace minegan
