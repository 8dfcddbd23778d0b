// miner: tasks and shapes in ops.h.
#include <algorithm>
#include <cmath>
#include <vector>

#include "exponential.h"
#include "miner_products.h"

namespace minegan {
namespace {

constexpr double kSlope = 0.2, kEpsilon = 1e-8;
constexpr int64_t kAlone = 1 << 15;  // below this many products a second thread costs more to start than it gives
constexpr int kScratch = -1, kNothing = -2;

int64_t samples_of(const MinerTask& task) {
  return MinerKind(task.kind) == MinerKind::outer ? task.depth[0] : task.columns;
}

int64_t lanes_of(const MinerTask& task) { return (samples_of(task) + kSamples - 1) / kSamples * kSamples; }

// A matrix of activations in the other order than it lies in memory.
template <class T>
struct Turned {
  const T* from = nullptr;
  std::vector<T> data;
};

// What one thread works with. scratch: of one miner of one chain where `own`, else of all of them.
template <class T>
struct Worker {
  T* const* tensors;
  T* scratch;
  bool own;
  int64_t B = 0, P = 0;  // of the task
  Turned<T> rows = {}, samples[2] = {};

  void forget() { rows.from = samples[0].from = samples[1].from = nullptr; }

  T* at(const MinerTask& task, const MinerRows& m, int64_t n) const {
    if (m.tensor == kNothing) return nullptr;
    if (m.tensor == kScratch) return scratch + m.offset + (own ? 0 : task.scratch + n * m.miner);
    return tensors[m.tensor] + m.offset + n * m.miner;
  }

  // [count, P], zero beyond the samples.
  const T* as_rows(const MinerTask& task, const MinerRows& m, int64_t n, int64_t count) {
    const T* from = at(task, m, n);
    if (m.sample == 1 && m.row == P) return from;
    if (rows.from == from) return rows.data.data();
    if (int64_t(rows.data.size()) < count * P) rows.data.resize(count * P);
    rows.from = from;
    T* to = rows.data.data();
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t b = 0; b < B; ++b) to[r * P + b] = from[r * m.row + b * m.sample];
      for (int64_t b = B; b < P; ++b) to[r * P + b] = 0;
    }
    return to;
  }

  // [B, count], rows `width` apart.
  const T* as_samples(const MinerTask& task, const MinerRows& m, int64_t n, int64_t count, int which, int64_t& width) {
    const T* from = at(task, m, n);
    width = m.sample;
    if (m.row == 1) return from;
    width = count;
    Turned<T>& turned = samples[which];
    if (turned.from == from) return turned.data.data();
    if (int64_t(turned.data.size()) < count * B) turned.data.resize(count * B);
    turned.from = from;
    T* to = turned.data.data();
    for (int64_t b = 0; b < B; ++b)
      for (int64_t r = 0; r < count; ++r) to[b * count + r] = from[r * m.row + b * m.sample];
    return to;
  }
};

template <class T>
MINEGAN_INLINE T tangent(T x) {
  if constexpr (sizeof(T) == 4)
    return hyperbolic_tangent(x);
  else
    return std::tanh(x);
}

template <class T, int L>
struct MinerRun {
  using Products = MinerProducts<T, L>;

  // Rows r0 .. r1 of what a task gives for miner n.
  static MINEGAN_INLINE void run(Worker<T>* worker, const MinerTask* task, int64_t n, int64_t r0, int64_t r1) {
    switch (MinerKind(task->kind)) {
      case MinerKind::product:
        return product(*worker, *task, n, r0, r1);
      case MinerKind::outer:
        return outer(*worker, *task, n, r0, r1);
      default:
        return project(*worker, *task, n);
    }
  }

  static MINEGAN_INLINE void product(Worker<T>& worker, const MinerTask& task, int64_t n, int64_t r0, int64_t r1) {
    const int64_t B = worker.B, P = worker.P, count = (r1 - r0) * P;
    T* const out = worker.at(task, task.out, n) + r0 * P;
    std::fill(out, out + count, T(0));
    for (int64_t i = 0; i < task.adds; ++i) {
      const MinerRows& m = task.add[i];
      const T *from = worker.at(task, m, n) + r0 * m.row, scale = T(task.add_scale[i]);
      const int64_t lanes = m.sample == 1 ? P : B;
      for (int64_t r = 0; r < r1 - r0; ++r)
        if (m.sample == 0)
          for (int64_t b = 0; b < P; ++b) out[r * P + b] += scale * from[r * m.row];
        else
          for (int64_t b = 0; b < lanes; ++b) out[r * P + b] += scale * from[r * m.row + b * m.sample];
    }
    for (int64_t i = 0; i < task.terms; ++i) {
      const MinerRows& m = task.matrix[i];
      const int64_t K = task.depth[i];
      const T *M = worker.at(task, m, n) + r0 * m.row, *x = worker.as_rows(task, task.source[i], n, K),
              scale = T(task.scale[i]);
      if (m.sample == 1)
        Products::by_width(P, typename Products::Product{M, m.row, r1 - r0, K, x, P, scale, out});
      else
        Products::by_width(P, typename Products::Transposed{M, m.sample, K, r1 - r0, x, P, scale, out});
    }
    if (T* raw = worker.at(task, task.raw, n)) std::copy(out, out + count, raw + r0 * P);
    const auto rows = [&](const MinerRows& m) -> const T* {
      const T* from = worker.at(task, m, n);
      return from ? from + r0 * P : nullptr;
    };
    epilogue(task, out, rows(task.h), rows(task.p), rows(task.q), count);
    if (T* copy = worker.at(task, task.copy, n)) leave(task.copy, out, copy, B, P, r0, r1);
  }

  static MINEGAN_INLINE void leave(const MinerRows& m, const T* out, T* to, int64_t B, int64_t P, int64_t r0,
                                   int64_t r1) {
    for (int64_t b = 0; b < B; ++b)
      for (int64_t r = r0; r < r1; ++r) to[b * m.sample + r * m.row] = out[(r - r0) * P + b];
  }

  static MINEGAN_INLINE void epilogue(const MinerTask& task, T* v, const T* h, const T* p, const T* q, int64_t count) {
    const T gain = T(task.gain), slope = T(kSlope);
    const auto act = MinerActivation(task.activation);
    if (MinerEpilogue(task.epilogue) == MinerEpilogue::value) {
      if (act == MinerActivation::relu)
        for (int64_t i = 0; i < count; ++i) v[i] = gain * (v[i] < 0 ? 0 : v[i]);
      else if (act == MinerActivation::lrelu)
        for (int64_t i = 0; i < count; ++i) v[i] = gain * (v[i] > 0 ? v[i] : slope * v[i]);
      else if (act == MinerActivation::tanh)
        for (int64_t i = 0; i < count; ++i) v[i] = gain * tangent(v[i]);
    } else if (act == MinerActivation::tanh) {
      for (int64_t i = 0; i < count; ++i) {
        const T first = 1 - h[i] * h[i];
        v[i] = gain * first * v[i];
        if (p) v[i] -= 2 * h[i] * first * p[i] * q[i];
      }
    } else if (act != MinerActivation::linear) {
      const T low = act == MinerActivation::relu ? T(0) : slope;
      for (int64_t i = 0; i < count; ++i) v[i] *= gain * (h[i] > 0 ? 1 : low);
    }
  }

  static MINEGAN_INLINE void outer(Worker<T>& worker, const MinerTask& task, int64_t n, int64_t r0, int64_t r1) {
    const int64_t B = worker.B, P = worker.P;
    typename Products::Pair pairs[kMinerTerms];
    const T* last = nullptr;
    std::vector<T> other;  // d of the first of two terms that both lie in another order
    for (int64_t i = 0; i < task.terms; ++i) {
      const T* d = worker.as_rows(task, task.matrix[i], n, task.rows);
      if (i + 1 < task.terms && d == worker.rows.data.data()) {
        other.assign(d, d + task.rows * P);
        d = other.data();
      }
      pairs[i].d = d + r0 * P;
      last = pairs[i].d;
      if (task.out.tensor != kNothing)
        pairs[i].x = worker.as_samples(task, task.source[i], n, task.columns, int(i), pairs[i].width);
    }
    if (T* out = worker.at(task, task.out, n))
      Products::outer(pairs, int(task.terms), P, B, r1 - r0, task.columns, out + r0 * task.columns, task.columns);
    if (T* sums = worker.at(task, task.raw, n))
      for (int64_t r = r0; r < r1; ++r) {
        T sum = 0;
        for (int64_t b = 0; b < B; ++b) sum += last[(r - r0) * P + b];
        sums[r] = sum;
      }
  }

  // Sums over the rows, one for each sample.
  static MINEGAN_INLINE void mean(const T* a, const T* b, int64_t rows, int64_t P, T* sums) {
    std::fill(sums, sums + P, T(0));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; s < P; ++s) sums[s] += a[r * P + s] * b[r * P + s];
    for (int64_t s = 0; s < P; ++s) sums[s] /= T(rows);
  }

  static MINEGAN_INLINE void project(Worker<T>& worker, const MinerTask& task, int64_t n) {
    const int64_t B = worker.B, P = worker.P, rows = task.rows;
    const auto kind = MinerKind(task.kind);
    std::vector<T> store(5 * P);
    T *inverse = store.data(), *zv = inverse + P, *zw = zv + P, *vw = zw + P, *ze = vw + P;
    const T *z = worker.at(task, task.add[0], n), *v = nullptr, *w = nullptr, *e = nullptr;
    mean(z, z, rows, P, inverse);
    for (int64_t s = 0; s < P; ++s) inverse[s] = 1 / std::sqrt(inverse[s] + T(kEpsilon));
    if (task.adds > 1) {  // of `along` and of `twice` what the Jacobian multiplies
      e = worker.as_rows(task, task.add[1], n, rows);
      mean(z, e, rows, P, ze);
    }
    std::vector<T> other;
    if (kind == MinerKind::twice) {
      if (e && e == worker.rows.data.data()) {
        other.assign(e, e + rows * P);
        e = other.data();
      }
      v = worker.at(task, task.h, n);
      w = worker.as_rows(task, task.p, n, rows);
      mean(z, v, rows, P, zv);
      mean(z, w, rows, P, zw);
      mean(v, w, rows, P, vw);
    }
    T* const out = worker.at(task, task.out, n);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; s < P; ++s) {
        const int64_t i = r * P + s;
        const T one = inverse[s], three = one * one * one;
        T value = kind == MinerKind::project ? z[i] * one : 0;
        if (e) value += one * e[i] - three * z[i] * ze[s];
        if (v)
          value += 3 * three * one * one * z[i] * zv[s] * zw[s] - three * (z[i] * vw[s] + v[i] * zw[s] + w[i] * zv[s]);
        out[i] = value;
      }
    if (T* copy = worker.at(task, task.copy, n)) leave(task.copy, out, copy, B, P, 0, rows);
  }
};

template <class T>
void run_task(Worker<T>& worker, const MinerTask& task, int64_t n, int64_t r0, int64_t r1) {
  worker.B = samples_of(task), worker.P = lanes_of(task);
  Worker<T>* const own = &worker;
  const MinerTask* const one = &task;
#if MINEGAN_X86
  if (current_isa() == Isa::avx512) return run_avx512<MinerRun<T, 64 / sizeof(T)>>(own, one, n, r0, r1);
  if (current_isa() == Isa::avx2) return run_avx2<MinerRun<T, 32 / sizeof(T)>>(own, one, n, r0, r1);
#endif
  MinerRun<T, 16 / sizeof(T)>::run(own, one, n, r0, r1);
}

bool splits(const MinerTask& task) {
  return MinerKind(task.kind) == MinerKind::product || MinerKind(task.kind) == MinerKind::outer;
}

template <class T>
void run_miners(const MinerTask* tasks, int64_t count, T* const* tensors, int threads) {
  struct Chain {
    int64_t first, last, miners, scratch;
  };
  std::vector<Chain> chains;
  int64_t miners = 0, products = 0, steps = 0, scratch = 0, most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const MinerTask& task = tasks[i];
    if (i == 0 || task.chain != tasks[i - 1].chain) {
      chains.push_back({i, i, task.miners, task.scratch_rows * lanes_of(task)});
      miners += task.miners;
      scratch = std::max(scratch, task.scratch + task.miners * chains.back().scratch);
      most = std::max(most, chains.back().scratch);
    }
    chains.back().last = i + 1;
    steps = std::max(steps, task.step + 1);
    for (int64_t t = 0; t < task.terms; ++t) products += task.miners * task.rows * task.columns * task.depth[t];
  }
  if (products < kAlone) threads = 1;
  std::atomic<int64_t> next{0};

  // Miners enough for all threads: each takes one after the other and waits for none.
  if (threads == 1 || miners % threads == 0 || miners >= 4 * threads) {
    parallel_for(threads, threads, [&](int64_t, int64_t) {
      std::vector<T> own(most);
      Worker<T> worker{tensors, own.data(), true};
      for (int64_t unit; (unit = next.fetch_add(1)) < miners;) {
        size_t c = 0;
        while (unit >= chains[c].miners) unit -= chains[c++].miners;
        worker.forget();
        for (int64_t i = chains[c].first; i < chains[c].last; ++i) run_task(worker, tasks[i], unit, 0, tasks[i].rows);
      }
    });
    return;
  }
  // Few miners: the rows of each step's tasks are divided among the threads.
  std::vector<T> common(scratch);
  for (int64_t step = 0; step < steps; ++step) {
    struct Unit {
      const MinerTask* task;
      int64_t n, part, parts;
    };
    std::vector<Unit> units;
    for (int64_t i = 0; i < count; ++i)
      if (tasks[i].step == step)
        for (int64_t n = 0; n < tasks[i].miners; ++n) {
          const int64_t parts = splits(tasks[i]) ? std::min<int64_t>(threads, tasks[i].rows) : 1;
          for (int64_t part = 0; part < parts; ++part) units.push_back({&tasks[i], n, part, parts});
        }
    next = 0;
    parallel_for(threads, threads, [&](int64_t, int64_t) {
      Worker<T> worker{tensors, common.data(), false};
      for (int64_t u; (u = next.fetch_add(1)) < int64_t(units.size());) {
        const Unit& unit = units[u];
        const int64_t rows = unit.task->rows;
        worker.forget();
        run_task(worker, *unit.task, unit.n, rows * unit.part / unit.parts, rows * (unit.part + 1) / unit.parts);
      }
    });
  }
}

}  // namespace

void miner_cpu(DType dtype, const MinerTask* tasks, int64_t count, void* const* tensors, int threads) {
  if (dtype == DType::float64)
    run_miners(tasks, count, (double* const*)tensors, threads);
  else
    run_miners(tasks, count, (float* const*)tensors, threads);
}

}  // namespace minegan
