// bias_act: equations and shapes in ops.h.
#include <algorithm>

#include "ops.h"

namespace minegan {
namespace {

// leak = slope gain. A slope of 0 gives 0 below the kink, also for an infinite v; a NaN side lets v's NaN through.
template <class A>
MINEGAN_HD A activate(A v, A side, A gain, A leak) {
  const A below = leak == 0 && side <= 0 ? A(0) : v * leak;
  return side > 0 ? v * gain : below;
}

// ---- CPU ----

constexpr int64_t kRows = 64;        // rows whose sum is one partial sum
constexpr int64_t kElements = 4096;  // elements of one channel whose sum is one partial sum
constexpr int64_t kAlone = 1 << 19;  // below this many elements a second thread costs more to start than it gives
constexpr int kLanes = 16;  // running sums of a channel: the same on every instruction set, hence the same bits

// Up to `count` elements that are `per_element ? one a channel : all of one channel`.
template <class T, bool per_element, bool has_y>
struct Segment {
  static MINEGAN_INLINE void run(const T* __restrict x, const T* __restrict b, const T* __restrict y, T* __restrict out,
                                 int64_t count, wide_t<T> gain, wide_t<T> leak) {
    const wide_t<T> bias = per_element || !b ? 0 : widen(*b);
    for (int64_t i = 0; i < count; ++i) {
      const wide_t<T> v = widen(x[i]) + (per_element ? widen(b[i]) : bias);
      out[i] = narrow<T>(activate(v, has_y ? widen(y[i]) : v, gain, leak));
    }
  }
};

template <class T, bool has_y>
struct Rows {
  static MINEGAN_INLINE void run(const T* x, const T* b, const T* y, T* out, Axis axis, wide_t<T> gain, wide_t<T> leak,
                                 int64_t begin, int64_t end) {
    for (int64_t at = begin * axis.C; at < end * axis.C; at += axis.C)
      Segment<T, true, has_y>::run(x + at, b, has_y ? y + at : nullptr, out + at, axis.C, gain, leak);
  }
};

// Unit u is the part u % parts of the channel (u / parts) % C in the sample u / parts / C.
template <class T, bool has_y>
struct Channels {
  static MINEGAN_INLINE void run(const T* x, const T* b, const T* y, T* out, Axis axis, wide_t<T> gain, wide_t<T> leak,
                                 int64_t begin, int64_t end) {
    const int64_t parts = (axis.inner + kElements - 1) / kElements;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t start = u % parts * kElements, at = u / parts * axis.inner + start;
      Segment<T, false, has_y>::run(x + at, b ? b + u / parts % axis.C : nullptr, has_y ? y + at : nullptr, out + at,
                                    std::min(kElements, axis.inner - start), gain, leak);
    }
  }
};

template <class T>
struct BackwardRows {
  static MINEGAN_INLINE void run(const T* __restrict dy, const T* __restrict y, T* __restrict dx,
                                 wide_t<T>* __restrict partial, Axis axis, wide_t<T> gain, wide_t<T> leak,
                                 int64_t begin, int64_t end) {
    for (int64_t row = begin * kRows; row < std::min(end * kRows, axis.outer); ++row) {
      wide_t<T>* sums = partial + row / kRows * axis.C;
      for (int64_t c = 0, at = row * axis.C; c < axis.C; ++c, ++at) {
        const wide_t<T> d = activate(widen(dy[at]), widen(y[at]), gain, leak);
        dx[at] = narrow<T>(d);
        sums[c] += d;
      }
    }
  }
};

template <class T>
struct BackwardChannels {
  static MINEGAN_INLINE void run(const T* __restrict dy, const T* __restrict y, T* __restrict dx,
                                 wide_t<T>* __restrict partial, Axis axis, wide_t<T> gain, wide_t<T> leak,
                                 int64_t begin, int64_t end) {
    const int64_t parts = (axis.inner + kElements - 1) / kElements;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t start = u % parts * kElements, at = u / parts * axis.inner + start;
      const int64_t count = std::min(kElements, axis.inner - start);
      wide_t<T> lanes[kLanes] = {};
      for (int64_t i = 0; i < count; i += kLanes) {
        const int width = int(std::min<int64_t>(kLanes, count - i));
        if (width == kLanes) {
          for (int j = 0; j < kLanes; ++j) {
            const wide_t<T> d = activate(widen(dy[at + i + j]), widen(y[at + i + j]), gain, leak);
            dx[at + i + j] = narrow<T>(d);
            lanes[j] += d;
          }
        } else {
          for (int j = 0; j < width; ++j) {
            const wide_t<T> d = activate(widen(dy[at + i + j]), widen(y[at + i + j]), gain, leak);
            dx[at + i + j] = narrow<T>(d);
            lanes[j] += d;
          }
        }
      }
      wide_t<T> sum = 0;
      for (const wide_t<T> lane : lanes) sum += lane;
      partial[(u / parts / axis.C * parts + u % parts) * axis.C + u / parts % axis.C] = sum;
    }
  }
};

template <class T>
void forward_cpu(const T* x, const T* b, const T* y, T* out, Axis axis, wide_t<T> gain, wide_t<T> leak, int threads) {
  const auto spread = [&](auto loop, int64_t units) {
    parallel_for(units, axis.outer * axis.C * axis.inner < kAlone ? 1 : threads,
                 [=](int64_t begin, int64_t end) { run<decltype(loop)>(x, b, y, out, axis, gain, leak, begin, end); });
  };
  const int64_t segments = axis.outer * axis.C * ((axis.inner + kElements - 1) / kElements);
  if (b && axis.inner == 1)
    y ? spread(Rows<T, true>{}, axis.outer) : spread(Rows<T, false>{}, axis.outer);
  else
    y ? spread(Channels<T, true>{}, segments) : spread(Channels<T, false>{}, segments);
}

template <class T>
void backward_cpu(const T* dy, const T* y, T* dx, T* db, Axis axis, wide_t<T> gain, wide_t<T> leak, int threads) {
  const bool rows = axis.inner == 1;
  const int64_t parts = (axis.inner + kElements - 1) / kElements;
  const int64_t partials = rows ? (axis.outer + kRows - 1) / kRows : axis.outer * parts;
  std::vector<wide_t<T>> partial(partials * axis.C);
  wide_t<T>* sums = partial.data();
  const int sharing = axis.outer * axis.C * axis.inner < kAlone ? 1 : threads;
  if (rows)
    parallel_for(partials, sharing, [=](int64_t begin, int64_t end) {
      run<BackwardRows<T>>(dy, y, dx, sums, axis, gain, leak, begin, end);
    });
  else
    parallel_for(partials * axis.C, sharing, [=](int64_t begin, int64_t end) {
      run<BackwardChannels<T>>(dy, y, dx, sums, axis, gain, leak, begin, end);
    });
  for (int64_t c = 0; c < axis.C; ++c) {
    double total = 0;
    for (int64_t p = 0; p < partials; ++p) total += sums[p * axis.C + c];
    db[c] = narrow<T>(wide_t<T>(total));
  }
}

}  // namespace

void bias_act_cpu(DType dtype, const void* x, const void* b, const void* y, void* out, Axis axis, double slope,
                  double gain, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    forward_cpu<T>((const T*)x, (const T*)b, (const T*)y, (T*)out, axis, gain, slope * gain, threads);
  });
}

void bias_act_backward_cpu(DType dtype, const void* dy, const void* y, void* dx, void* db, Axis axis, double slope,
                           double gain, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    backward_cpu<T>((const T*)dy, (const T*)y, (T*)dx, (T*)db, axis, gain, slope * gain, threads);
  });
}

// ---- CUDA ----

#ifdef MINEGAN_CUDA

namespace {

constexpr int kThreads = 256;

// Packs that a thread loads before it needs one of them, because memory answers late: two of x, or one of x and of y.
template <bool side>
constexpr int kInFlight = side ? 1 : 2;

// A thread takes packs of V elements. V > 1 needs aligned pointers, and V | C where inner = 1 (a pack spans V
// channels), else V | inner. kSide: whether y is given.
template <class T, class Index, int V, bool kSide>
__global__ void __launch_bounds__(kThreads)
    bias_act_kernel(const T* __restrict__ x, const T* __restrict__ b, const T* __restrict__ y, T* __restrict__ out,
                    Index packs, Index C, Index inner, wide_t<T> gain, wide_t<T> leak) {
  constexpr int kPacks = kInFlight<kSide>;
  constexpr Index kBlock = kPacks * kThreads;
  for (Index first = blockIdx.x * kBlock + threadIdx.x; first < packs; first += gridDim.x * kBlock) {
    Pack<T, V> xs[kPacks]{}, ys[kPacks]{};
    for (int i = 0; i < kPacks; ++i) {
      const Index p = first + i * kThreads;
      if (p < packs) xs[i] = load<T, V>(x + p * V);
      if (kSide && p < packs) ys[i] = load<T, V>(y + p * V);
    }
    for (int i = 0; i < kPacks; ++i) {
      const Index p = first + i * kThreads, at = p * V;
      if (p >= packs) break;
      Pack<T, V> bs{}, result;
      if (b && inner == 1) {
        bs = load<T, V>(b + at % C);
      } else if (b) {
        const T bias = b[at / inner % C];
        for (int j = 0; j < V; ++j) bs.at[j] = bias;
      }
      for (int j = 0; j < V; ++j) {
        const wide_t<T> v = widen(xs[i].at[j]) + widen(bs.at[j]);
        result.at[j] = narrow<T>(activate(v, kSide ? widen(ys[i].at[j]) : v, gain, leak));
      }
      store(out + at, result);
    }
  }
}

// inner = 1. Block (i, s) takes the columns of X V from i X V on and the rows of split s; its threads are X wide.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    bias_act_backward_rows_kernel(const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dx,
                                  wide_t<T>* __restrict__ partial, int64_t rows, int64_t C, int X, wide_t<T> gain,
                                  wide_t<T> leak) {
  __shared__ wide_t<T> sums[kThreads * V];
  const int lane = threadIdx.x % X, line = threadIdx.x / X, Y = kThreads / X;
  const int64_t column = (int64_t(blockIdx.x) * X + lane) * V;
  const int64_t share = (rows + gridDim.y - 1) / gridDim.y, end = min(rows, (blockIdx.y + 1) * share);
  wide_t<T> sum[V] = {};
  if (column < C) {
    for (int64_t row = blockIdx.y * share + line; row < end; row += Y) {
      const int64_t at = row * C + column;
      const Pack<T, V> dys = load<T, V>(dy + at), ys = load<T, V>(y + at);
      Pack<T, V> result;
      for (int j = 0; j < V; ++j) {
        const wide_t<T> d = activate(widen(dys.at[j]), widen(ys.at[j]), gain, leak);
        result.at[j] = narrow<T>(d);
        sum[j] += d;
      }
      store(dx + at, result);
    }
  }
  for (int j = 0; j < V; ++j) sums[j * kThreads + threadIdx.x] = sum[j];
  for (int half = Y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (line < half)
      for (int j = 0; j < V; ++j) sums[j * kThreads + threadIdx.x] += sums[j * kThreads + threadIdx.x + half * X];
  }
  if (line == 0 && column < C)
    for (int j = 0; j < V; ++j) partial[(column + j) * gridDim.y + blockIdx.y] = sums[j * kThreads + lane];
}

// inner > 1. Block (c, s) takes the split s of the channel c.
template <class T, class Index, int V>
__global__ void __launch_bounds__(kThreads)
    bias_act_backward_channels_kernel(const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dx,
                                      wide_t<T>* __restrict__ partial, Index outer, Index C, Index inner,
                                      wide_t<T> gain, wide_t<T> leak) {
  __shared__ wide_t<T> sums[kThreads];
  const Index line = inner / V, packs = outer * line, share = (packs + gridDim.y - 1) / gridDim.y;
  const Index end = min(packs, (blockIdx.y + 1) * share);
  wide_t<T> sum = 0;
  for (Index p = blockIdx.y * share + threadIdx.x; p < end; p += kThreads) {
    const Index at = (p / line * C + blockIdx.x) * inner + p % line * V;
    const Pack<T, V> dys = load<T, V>(dy + at), ys = load<T, V>(y + at);
    Pack<T, V> result;
    for (int j = 0; j < V; ++j) {
      const wide_t<T> d = activate(widen(dys.at[j]), widen(ys.at[j]), gain, leak);
      result.at[j] = narrow<T>(d);
      sum += d;
    }
    store(dx + at, result);
  }
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) partial[Index(blockIdx.x) * gridDim.y + blockIdx.y] = sums[0];
}

// One warp adds up one channel's partial sums.
template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_act_db_kernel(const wide_t<T>* __restrict__ partial, T* __restrict__ db, int64_t C, int64_t splits) {
  const int64_t c = (blockIdx.x * int64_t(kThreads) + threadIdx.x) / 32;
  if (c >= C) return;
  wide_t<T> sum = 0;
  for (int64_t s = threadIdx.x % 32; s < splits; s += 32) sum += partial[c * splits + s];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffff, sum, offset);
  if (threadIdx.x % 32 == 0) db[c] = narrow<T>(sum);
}

// Calls f with the pack width that pointers and sizes allow, as a type.
template <class T, class F>
void with_pack(Axis axis, std::initializer_list<const void*> pointers, F&& f) {
  constexpr int V = 16 / sizeof(T);
  const bool fits = (axis.inner == 1 ? axis.C : axis.inner) % V == 0;
  if (fits && std::all_of(pointers.begin(), pointers.end(), aligned16))
    f(std::integral_constant<int, V>{});
  else
    f(std::integral_constant<int, 1>{});
}

// Calls f with the smallest index type, unsigned for its cheaper division, that reaches all elements and one grid
// beyond.
template <class F>
void with_index(int64_t count, F&& f) {
  if (count < int64_t(1) << 31)
    f(uint32_t{});
  else
    f(uint64_t{});
}

}  // namespace

std::string bias_act_cuda_problem(int device) { return problem_of(bias_act_kernel<float, uint32_t, 1, false>, device); }

void bias_act_cuda(DType dtype, const void* x, const void* b, const void* y, void* out, Axis axis, double slope,
                   double gain, int device, uintptr_t stream) {
  const int64_t count = axis.outer * axis.C * axis.inner;
  if (count == 0) return;
  DeviceGuard guard(device);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_pack<T>(axis, {x, b, y, out}, [&](auto width) {
      with_index(count, [&](auto index) {
        using Index = decltype(index);
        constexpr int V = decltype(width)::value;
        const int64_t each = (y ? kInFlight<true> : kInFlight<false>)*kThreads;
        const int64_t blocks = std::min<int64_t>((count / V + each - 1) / each, 1 << 20);
        const auto kernel = y ? bias_act_kernel<T, Index, V, true> : bias_act_kernel<T, Index, V, false>;
        kernel<<<unsigned(blocks), kThreads, 0, (cudaStream_t)stream>>>((const T*)x, (const T*)b, (const T*)y, (T*)out,
                                                                        Index(count / V), Index(axis.C),
                                                                        Index(axis.inner), gain, slope * gain);
      });
    });
  });
  check_cuda(cudaGetLastError(), "bias_act");
}

// Enough blocks to fill a large GPU, and no block without a few thousand elements. The shape alone decides, so the
// sums' order does not depend on the GPU.
int64_t bias_act_backward_splits(Axis axis) {
  const int64_t blocks = axis.inner == 1 ? (axis.C + 127) / 128 : axis.C;
  const int64_t work = axis.inner == 1 ? axis.outer / 64 : axis.outer * axis.inner / 4096;
  return std::max<int64_t>(1, std::min(work, 1024 / std::max<int64_t>(1, blocks)));
}

void bias_act_backward_cuda(DType dtype, const void* dy, const void* y, void* dx, void* db, void* partial, Axis axis,
                            double slope, double gain, int device, uintptr_t stream_) {
  if (axis.C == 0) return;
  DeviceGuard guard(device);
  const cudaStream_t stream = (cudaStream_t)stream_;
  const int64_t splits = bias_act_backward_splits(axis), count = axis.outer * axis.C * axis.inner;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using A = wide_t<T>;
    with_pack<T>(axis, {dy, y, dx}, [&](auto width) {
      constexpr int V = decltype(width)::value;
      if (axis.inner == 1) {
        int X = 1;
        while (X < 32 && X * V < axis.C) X *= 2;
        const dim3 grid(unsigned((axis.C + X * V - 1) / (X * V)), unsigned(splits));
        bias_act_backward_rows_kernel<T, V><<<grid, kThreads, 0, stream>>>(
            (const T*)dy, (const T*)y, (T*)dx, (A*)partial, axis.outer, axis.C, X, gain, slope * gain);
      } else {
        with_index(count, [&](auto index) {
          using Index = decltype(index);
          const dim3 grid(unsigned(axis.C), unsigned(splits));
          bias_act_backward_channels_kernel<T, Index, V>
              <<<grid, kThreads, 0, stream>>>((const T*)dy, (const T*)y, (T*)dx, (A*)partial, Index(axis.outer),
                                              Index(axis.C), Index(axis.inner), gain, slope * gain);
        });
      }
    });
    check_cuda(cudaGetLastError(), "bias_act_backward");
    bias_act_db_kernel<T><<<unsigned((axis.C * 32 + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
        (const A*)partial, (T*)db, axis.C, splits);
  });
  check_cuda(cudaGetLastError(), "bias_act_backward");
}

#endif

}  // namespace minegan
