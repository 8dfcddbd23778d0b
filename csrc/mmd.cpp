// mmd: equations and shapes in ops.h.
#include <algorithm>

#include "mmd_rows.h"

namespace minegan {
namespace {

template <Kernel kernel, int order>
struct Rows {
  static MINEGAN_INLINE void run(const MmdTile* tile, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) tile->totals[r] = RowLoop<kernel, order>::run(*tile, r);
  }
};

template <Kernel kernel, int order>
void all_rows(const MmdTile& tile, int threads) {
  const int used = tile.rows * tile.columns < kAlone ? 1 : threads;
  const int64_t share = std::max<int64_t>(1, tile.rows / (8 * used));  // above the diagonal rows differ in length
  std::atomic<int64_t> next{0};
  parallel_for(used, used, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(share)) < tile.rows;)
      run<Rows<kernel, order>>(&tile, begin, std::min(begin + share, tile.rows));
  });
}

template <Kernel kernel>
void all_orders(const MmdTile& tile, int order, int threads) {
  if (order == -1) return all_rows<kernel, -1>(tile, threads);
  if (order == 0) return all_rows<kernel, 0>(tile, threads);
  if (order == 1) return all_rows<kernel, 1>(tile, threads);
  all_rows<kernel, 2>(tile, threads);
}

}  // namespace

void mmd_tile_cpu(const MmdTile& tile, Kernel kernel, int order, int threads) {
  switch (kernel) {
    case Kernel::gaussian:
      return all_orders<Kernel::gaussian>(tile, order, threads);
    case Kernel::laplacian:
      return all_orders<Kernel::laplacian>(tile, order, threads);
    case Kernel::polynomial:
      return all_orders<Kernel::polynomial>(tile, order, threads);
    case Kernel::energy:
      return all_orders<Kernel::energy>(tile, order, threads);
  }
}

}  // namespace minegan
