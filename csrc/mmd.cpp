// mmd: equations and shapes in ops.h.
#include <algorithm>

#include "mmd_rows.h"

namespace minegan {
namespace {

template <int kernel, int order>
struct Rows {
  static MINEGAN_INLINE void run(const MmdTile* tile, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) tile->totals[r] = RowLoop<kernel, order>::run(*tile, r);
  }
};

template <int kernel, int order>
void all_rows(const MmdTile& tile, int threads) {
  const int used = tile.rows * tile.columns < kAlone ? 1 : threads;
  const int64_t share = std::max<int64_t>(1, tile.rows / (8 * used));  // above the diagonal rows differ in length
  std::atomic<int64_t> next{0};
  parallel_for(used, used, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(share)) < tile.rows;)
      run<Rows<kernel, order>>(&tile, begin, std::min(begin + share, tile.rows));
  });
}

template <int kernel>
void all_orders(const MmdTile& tile, int order, int threads) {
  if (order == -1) return all_rows<kernel, -1>(tile, threads);
  if (order == 0) return all_rows<kernel, 0>(tile, threads);
  if (order == 1) return all_rows<kernel, 1>(tile, threads);
  all_rows<kernel, 2>(tile, threads);
}

}  // namespace

void mmd_tile_cpu(const MmdTile& tile, int kernel, int order, int threads) {
  if (kernel == kGaussian) all_orders<kGaussian>(tile, order, threads);
  if (kernel == kLaplacian) all_orders<kLaplacian>(tile, order, threads);
  if (kernel == kEnergy) all_orders<kEnergy>(tile, order, threads);
  if (kernel == kPolynomial) all_orders<kPolynomial>(tile, order, threads);
}

}  // namespace minegan
