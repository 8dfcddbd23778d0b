// row_score: equations and shapes in ops.h.
#include <algorithm>

#include "ops.h"

namespace minegan {
namespace {

// In double: neither the square of a small gradient underflows nor that of a large one overflows, and memory is slower
// than the conversion.
template <Kind kind>
MINEGAN_HD double term(double g, double w) {
  if (kind == Kind::square) return g * g;
  if (kind == Kind::abs) return g < 0 ? -g : g;
  return g * w;
}

constexpr int kLanes = 32;           // running sums of a row: the same on every instruction set, hence the same bits
constexpr int kTile = 512;           // elements side by side that short runs are added up in
constexpr int64_t kShare = 1 << 14;  // elements of a task, about
constexpr int64_t kAlone = 1 << 19;  // below this many elements a second thread costs more to start than it gives

struct Task {
  const ScoredRows* entry;
  int64_t begin, end;  // rows
  int64_t position;    // elements before it
};

// Rows whose elements lie in runs of at least kLanes.
template <class T, Kind kind>
struct LongRuns {
  static MINEGAN_INLINE void run(const T* __restrict g, const T* __restrict w, double* __restrict out, Axis axis,
                                 double factor, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double lanes[kLanes] = {};
      for (int64_t o = 0; o < axis.outer; ++o) {
        const int64_t at = (o * axis.C + c) * axis.inner, whole = axis.inner / kLanes * kLanes;
        for (int64_t i = at; i < at + whole; i += kLanes)
          for (int j = 0; j < kLanes; ++j)
            lanes[j] += term<kind>(widen(g[i + j]), kind == Kind::product ? widen(w[i + j]) : 0);
        for (int64_t i = whole; i < axis.inner; ++i)
          lanes[i - whole] += term<kind>(widen(g[at + i]), kind == Kind::product ? widen(w[at + i]) : 0);
      }
      double sum = 0;
      for (const double lane : lanes) sum += lane;
      out[c] += factor * sum;
    }
  }
};

// Rows of short runs: neighbouring rows are added up side by side, at most kTile elements.
template <class T, Kind kind>
struct ShortRuns {
  static MINEGAN_INLINE void run(const T* __restrict g, const T* __restrict w, double* __restrict out, Axis axis,
                                 double factor, int64_t begin, int64_t end) {
    const int64_t most = kTile / axis.inner;
    for (int64_t first = begin; first < end; first += most) {
      const int64_t rows = std::min(most, end - first), width = rows * axis.inner;
      double sums[kTile] = {};
      for (int64_t o = 0; o < axis.outer; ++o) {
        const int64_t at = (o * axis.C + first) * axis.inner;
        for (int64_t j = 0; j < width; ++j)
          sums[j] += term<kind>(widen(g[at + j]), kind == Kind::product ? widen(w[at + j]) : 0);
      }
      for (int64_t c = 0; c < rows; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < axis.inner; ++i) sum += sums[c * axis.inner + i];
        out[first + c] += factor * sum;
      }
    }
  }
};

std::vector<Task> split(const ScoredRows* table, int64_t entries, int64_t& elements) {
  std::vector<Task> tasks;
  elements = 0;
  for (const ScoredRows* entry = table; entry < table + entries; ++entry) {
    const Axis& axis = entry->axis;
    const int64_t length = axis.outer * axis.inner,
                  most = std::max<int64_t>(1, kTile / std::max<int64_t>(1, axis.inner));
    if (length == 0) continue;
    const int64_t rows = (std::max<int64_t>(1, kShare / length) + most - 1) / most * most;
    for (int64_t begin = 0; begin < axis.C; begin += rows) {
      tasks.push_back({entry, begin, std::min(axis.C, begin + rows), elements});
      elements += length * (tasks.back().end - begin);
    }
  }
  return tasks;
}

template <class T, Kind kind>
void perform(const Task& task, double* out, double factor) {
  const ScoredRows& e = *task.entry;
  const T *g = (const T*)e.g, *w = (const T*)e.w;
  if (e.axis.inner < kLanes)
    run<ShortRuns<T, kind>>(g, w, out + e.start, e.axis, factor, task.begin, task.end);
  else
    run<LongRuns<T, kind>>(g, w, out + e.start, e.axis, factor, task.begin, task.end);
}

template <class T>
void perform(Kind kind, const Task& task, double* out, double factor) {
  switch (kind) {
    case Kind::square:
      return perform<T, Kind::square>(task, out, factor);
    case Kind::abs:
      return perform<T, Kind::abs>(task, out, factor);
    case Kind::product:
      return perform<T, Kind::product>(task, out, factor);
  }
}

}  // namespace

void row_score_cpu(DType dtype, Kind kind, const ScoredRows* table, int64_t entries, double* out, double factor,
                   int threads) {
  int64_t elements;
  const std::vector<Task> tasks = split(table, entries, elements);
  const auto before = [](const Task& task, int64_t position) { return task.position < position; };
  with_type(dtype, [&](auto type) {
    parallel_for(elements, elements < kAlone ? 1 : threads, [&](int64_t begin, int64_t end) {
      const auto last = std::lower_bound(tasks.begin(), tasks.end(), end, before);
      for (auto task = std::lower_bound(tasks.begin(), tasks.end(), begin, before); task != last; ++task)
        perform<decltype(type)>(kind, *task, out, factor);
    });
  });
}

}  // namespace minegan
