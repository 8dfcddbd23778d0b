// row_update: equations and shapes in ops.h.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace minegan {
namespace {

// What the equations need of one call, rounded to the type they are computed in.
template <class A>
struct Factors {
  A unscale, lr, decay, keep, mean, square, new_square, eps, momentum, average;
  bool low;  // the new mean is taken from the old one's side, as torch.lerp does it
};

template <class A>
MINEGAN_HD Factors<A> factors(const RowStep& s, const float* grad_scale) {
  const double mean = 1 - s.beta1;
  Factors<A> f;
  f.low = A(mean) < A(0.5);
  // The reciprocal is rounded to float before it is used, as torch.amp.GradScaler rounds it.
  f.unscale = grad_scale ? A(float(1 / double(*grad_scale))) : A(1);
  f.lr = A(s.lr);
  f.decay = A(s.decay);
  f.keep = A(1 - s.lr * s.decay);
  f.mean = f.low ? A(mean) : A(mean) - 1;
  f.square = A(s.beta2);
  f.new_square = A(1 - s.beta2);
  f.eps = A(s.eps);
  f.momentum = A(s.momentum);
  f.average = A(s.average);
  return f;
}

// What they need of a row: η / (1 - β₁ᵗ) and √(1 - β₂ᵗ).
template <class A>
struct Age {
  A size, root;
};

template <class A>
MINEGAN_HD Age<A> age_of(float t, const RowStep& s) {
  return {A(s.lr / (1 - exp2(t * s.log_beta1))), A(std::sqrt(1 - exp2(t * s.log_beta2)))};
}

MINEGAN_HD bool has_age(Rule rule) { return rule == Rule::adam || rule == Rule::adamw; }

template <Rule rule, class A>
MINEGAN_HD void advance(A& w, A g, A& m, A& v, const Factors<A>& f, Age<A> age) {
  g *= f.unscale;
  if (rule == Rule::adamw)
    w *= f.keep;
  else
    g = f.decay != 0 ? g + f.decay * w : g;
  if (has_age(rule)) {
    m = (f.low ? m : g) + f.mean * (g - m);
    v = f.square * v + f.new_square * g * g;
    w -= age.size * m / (std::sqrt(v) / age.root + f.eps);
  } else {
    if (rule == Rule::momentum) g = m = f.momentum * m + g;
    w -= f.lr * g;
  }
}

// torch.lerp(e, w, average), which leaves an average alone that equals w.
template <class A>
MINEGAN_HD A averaged(A e, A w, A average) {
  return average < A(0.5) ? e + average * (w - e) : w - (w - e) * (1 - average);
}

// Calls f with the types of the leaf and the weight, and the rule as a type.
template <class F>
void with_kinds(DType dtype, DType weight_dtype, Rule rule, F&& f) {
  const auto with_rule = [&](auto leaf, auto weight) {
    switch (rule) {
      case Rule::adam:
        return f(leaf, weight, std::integral_constant<Rule, Rule::adam>{});
      case Rule::adamw:
        return f(leaf, weight, std::integral_constant<Rule, Rule::adamw>{});
      case Rule::sgd:
        return f(leaf, weight, std::integral_constant<Rule, Rule::sgd>{});
      case Rule::momentum:
        return f(leaf, weight, std::integral_constant<Rule, Rule::momentum>{});
    }
  };
  if (dtype == DType::float64 && weight_dtype == DType::float64) return with_rule(double{}, double{});
  if (dtype == DType::float32 && weight_dtype == DType::float32) return with_rule(float{}, float{});
  if (dtype == DType::float32 && weight_dtype == DType::bfloat16) return with_rule(float{}, BFloat16{});
  if (dtype == DType::float32 && weight_dtype == DType::float16) return with_rule(float{}, Float16{});
  throw std::invalid_argument("row_update takes no such pair of dtypes");
}

// ---- CPU ----

constexpr int64_t kRun = 2048;       // elements stepped before they are written through: they are in the cache then
constexpr int64_t kAlone = 1 << 17;  // elements, below which a second thread costs more to start than it gives

template <Rule rule, class T>
MINEGAN_INLINE void advance_run(T* __restrict w, const T* __restrict g, T* __restrict m, T* __restrict v, int64_t n,
                                const Factors<T>& factors, Age<T> age) {
  const Factors<T> f = factors;
  for (int64_t i = 0; i < n; ++i) {
    T mean = rule == Rule::sgd ? T(0) : m[i], square = has_age(rule) ? v[i] : T(0);
    advance<rule>(w[i], g[i], mean, square, f, age);
    if (rule != Rule::sgd) m[i] = mean;
    if (has_age(rule)) v[i] = square;
  }
}

template <class T>
MINEGAN_INLINE void average_run(T* __restrict e, const T* __restrict w, int64_t n, T average) {
  for (int64_t i = 0; i < n; ++i) e[i] = averaged(e[i], w[i], average);
}

// Elements [first, first + n) of one row.
template <class T, class D>
MINEGAN_INLINE void write_run(const RowTensor& t, int64_t row, const T* __restrict w, int64_t first, int64_t n) {
  D* const to = (D*)t.weight + t.rows[row] * t.row_stride;
  int64_t outer = first / t.inner, at = first % t.inner;
  while (n > 0) {
    const int64_t count = std::min(n, t.inner - at), stride = t.inner_stride;
    D* __restrict out = to + outer * t.outer_stride + at * stride;
    if (stride == 1)
      for (int64_t i = 0; i < count; ++i) out[i] = narrow<D>(w[i]);
    else
      for (int64_t i = 0; i < count; ++i) out[i * stride] = narrow<D>(w[i]);
    w += count, n -= count, at = 0, ++outer;
  }
}

// Rows whose first element is among the elements [begin, end) of all tensors.
template <Rule rule, class T, class D>
struct StepRows {
  static MINEGAN_INLINE void run(const RowTensor* tensors, const void* const* grads, int64_t n, const RowStep* step,
                                 const Factors<T>* f, int64_t begin, int64_t end) {
    // `begin` and `end` are counted from the first element of tensor i. `age` is that of a row's `known`-th step: rows
    // of one age share its powers, which are computed in double.
    float known = -1;
    Age<T> age{};
    for (int64_t i = 0; i < n && end > 0; ++i) {
      const RowTensor& t = tensors[i];
      const int64_t size = t.count * t.length, L = t.length;
      if (L && begin < size) {
        const T* grad = (const T*)grads[i];
        const int64_t stop = std::min(t.count, (end + L - 1) / L);
        for (int64_t row = (std::max<int64_t>(begin, 0) + L - 1) / L, next; row < stop; row = next) {
          // Neighbouring rows of one age are stepped as one run of memory, as long as that stays in the cache.
          for (next = row + 1; next < stop && (next + 1 - row) * L <= kRun; ++next)
            if (has_age(rule) && t.step[next] != t.step[row]) break;
          if (grad && has_age(rule)) {
            if (t.step[row] + 1 != known) age = age_of<T>(known = t.step[row] + 1, *step);
            for (int64_t r = row; r < next; ++r) t.step[r] = known;
          }
          for (int64_t at = row * L; at < next * L; at += kRun) {
            const int64_t count = std::min(kRun, next * L - at);
            T* const w = (T*)t.leaf + at;
            if (grad) advance_run<rule>(w, grad + at, (T*)t.mean + at, (T*)t.square + at, count, *f, age);
            if (t.average) average_run((T*)t.average + at, w, count, f->average);
            if (!grad || !t.weight) continue;
            // A single row may be longer than kRun and comes in parts; several rows are whole.
            if (next == row + 1)
              write_run<T, D>(t, row, w, at - row * L, count);
            else
              for (int64_t r = row; r < next; ++r) write_run<T, D>(t, r, w + (r - row) * L, 0, L);
          }
        }
      }
      begin -= size, end -= size;
    }
  }
};

}  // namespace

void row_update_cpu(DType dtype, DType weight_dtype, Rule rule, const RowTensor* tensors, const void* const* grads,
                    int64_t n, const RowStep& step, const float* grad_scale, const float* found_inf, int threads) {
  if (found_inf && *found_inf != 0) return;
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += tensors[i].count * tensors[i].length;
  const int sharing = int(std::min<int64_t>(threads, std::max<int64_t>(1, total / kAlone)));
  with_kinds(dtype, weight_dtype, rule, [&](auto leaf, auto weight, auto constant) {
    using T = decltype(leaf);
    using Loop = StepRows<decltype(constant)::value, T, decltype(weight)>;
    const Factors<T> f = factors<T>(step, grad_scale);
    const RowStep* const s = &step;
    const Factors<T>* const uniform = &f;
    parallel_for(total, sharing,
                 [=](int64_t begin, int64_t end) { run<Loop>(tensors, grads, n, s, uniform, begin, end); });
  });
}

// ---- CUDA ----

#ifdef MINEGAN_CUDA

namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 1024;  // elements of a work item: CHUNK in minegan_fast/ops/_row_table.py

// A pointer read from memory could lead anywhere, for all that the compiler knows; it makes faster accesses of one that
// is said to lead to global memory.
template <class T>
__device__ __forceinline__ T* global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

// An item begins at element `first` of its first row; a thread takes V elements of it, and the V that lie kThreads V
// further on, and so on. `ages` has one for each row of the item.
template <Rule rule, class T, class D, int V>
__device__ __forceinline__ void step_item(const RowTensor& t, const RowItem& item, const T* grad, const Age<T>* ages,
                                          const Factors<T>& f) {
  const uint32_t length = uint32_t(t.length), first = uint32_t(item.part) * kChunk;
  const uint32_t count = item.rows > 1 ? item.rows * length : min(length - first, uint32_t(kChunk));
  const int64_t base = item.row * t.length + first;
  T* const leaf = global((T*)t.leaf) + base;
  T* const mean = global((T*)t.mean) + base;
  T* const square = global((T*)t.square) + base;
  T* const average = global((T*)t.average) + base;
  for (uint32_t i = threadIdx.x * V; i < count; i += kThreads * V) {
    const uint32_t local = item.rows > 1 ? i / length : 0, column = first + i - local * length;
    Pack<T, V> w = load<T, V>(leaf + i);
    if (grad) {
      const Pack<T, V> g = load<T, V>(global(grad) + base + i);
      Pack<T, V> m{}, v{};
      Age<T> age{};
      if (rule != Rule::sgd) m = load<T, V>(mean + i);
      if (has_age(rule)) v = load<T, V>(square + i), age = ages[local];
      for (int j = 0; j < V; ++j) advance<rule>(w.at[j], g.at[j], m.at[j], v.at[j], f, age);
      store(leaf + i, w);
      if (rule != Rule::sgd) store(mean + i, m);
      if (has_age(rule)) store(square + i, v);
      if (t.weight) {
        const uint32_t inner = uint32_t(t.inner);
        Pack<D, V> out;
        for (int j = 0; j < V; ++j) out.at[j] = narrow<D>(w.at[j]);
        store(global((D*)t.weight) + global(t.rows)[item.row + local] * t.row_stride + column / inner * t.outer_stride +
                  column % inner * t.inner_stride,
              out);
      }
    }
    if (t.average) {
      Pack<T, V> e = load<T, V>(average + i);
      for (int j = 0; j < V; ++j) e.at[j] = averaged(e.at[j], w.at[j], f.average);
      store(average + i, e);
    }
  }
}

template <Rule rule, class T, class D>
__global__ void __launch_bounds__(kThreads)
    row_update_kernel(const RowTensor* __restrict__ tensors, const uintptr_t* __restrict__ grads,
                      const RowItem* __restrict__ items, RowStep step, const void* lr, bool lr_is_float,
                      const float* grad_scale, const float* found_inf) {
  if (found_inf && *found_inf != 0) return;
  const RowItem item = items[blockIdx.x];
  const RowTensor& t = tensors[item.tensor];
  const T* grad = (const T*)grads[item.tensor];
  if (lr) step.lr = lr_is_float ? double(*(const float*)lr) : *(const double*)lr;
  // The corrections are computed in double, which is slow on many GPUs: once for each row, not for each element.
  __shared__ Age<T> ages[kChunk];
  if (has_age(rule) && grad) {
    for (int r = threadIdx.x; r < item.rows; r += kThreads) ages[r] = age_of<T>(global(t.step)[item.row + r] + 1, step);
    __syncthreads();
  }
  const Factors<T> f = factors<T>(step, grad_scale);
  constexpr int V = 16 / sizeof(T);
  if (t.aligned && uintptr_t(grad) % 16 == 0)
    step_item<rule, T, D, V>(t, item, grad, ages, f);
  else
    step_item<rule, T, D, 1>(t, item, grad, ages, f);
  if (!has_age(rule) || !grad) return;
  // Each age is advanced by the thread that has read it, which no other thread of the block has. Of the blocks that
  // share a row, the last one to take a ticket advances it. One fence keeps the read of each block before its ticket,
  // the other keeps what the last block writes after the tickets of all.
  const unsigned parts = unsigned((t.length + kChunk - 1) / kChunk);
  if (parts == 1) {
    for (int r = threadIdx.x; r < item.rows; r += kThreads) t.step[item.row + r] += 1;
  } else if (threadIdx.x == 0) {
    __threadfence();
    if (atomicInc(t.tickets + item.row, parts - 1) == parts - 1) {  // the last ticket makes it 0 again
      __threadfence();
      t.step[item.row] += 1;
    }
  }
}

}  // namespace

std::string row_update_cuda_problem(int device) {
  return problem_of(row_update_kernel<Rule::sgd, float, float>, device);
}

void row_update_cuda(DType dtype, DType weight_dtype, Rule rule, const RowTensor* tensors, const uintptr_t* grads,
                     const RowItem* items, int64_t n, const RowStep& step, const void* lr, bool lr_is_float,
                     const float* grad_scale, const float* found_inf, int device, uintptr_t stream) {
  if (n == 0) return;
  DeviceGuard guard(device);
  with_kinds(dtype, weight_dtype, rule, [&](auto leaf, auto weight, auto constant) {
    row_update_kernel<decltype(constant)::value, decltype(leaf), decltype(weight)>
        <<<unsigned(n), kThreads, 0, (cudaStream_t)stream>>>(tensors, grads, items, step, lr, lr_is_float, grad_scale,
                                                             found_inf);
  });
  check_cuda(cudaGetLastError(), "row_update");
}

#endif

}  // namespace minegan
