// The part of CUDA that csrc/*.cu uses, for a C++ compiler: kernels run on the CPU, under its sanitizers (blocks.cpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads)
#define __isGlobal(pointer) true
#define __builtin_assume(condition) static_cast<void>(condition)

using std::min;

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration = 9 };
cudaError_t cudaGetLastError();
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

namespace cuda_on_cpu {

struct Indices {
  uint3 thread, block;
  dim3 threads, blocks;
};
const Indices& indices();

void run(dim3 grid, dim3 block, const std::function<void()>& kernel);
void* shared_memory(int line, size_t bytes);
uint64_t shuffle(unsigned mask, uint64_t value, unsigned lane);
void before_atomic(void* address);
void after_atomic(void* address);

// What `__shared__ T name[n];` is rewritten to: auto& name = shared<T[n]>(__LINE__);
template <class Array>
Array& shared(int line) {
  return *static_cast<Array*>(shared_memory(line, sizeof(Array)));
}

struct Launch {
  template <class... A>
  struct Call {
    dim3 grid, block;
    std::tuple<A...> arguments;
  };
  dim3 grid, block;
  Launch(dim3 grid, dim3 block, size_t, cudaStream_t) : grid(grid), block(block) {}
  template <class... A>
  Call<A...> operator()(A... arguments) const {
    return {grid, block, {arguments...}};
  }
};

// What kernel<<<grid, block, shared, stream>>>(arguments) is rewritten to: kernel->*Launch(grid, ...)(arguments).
template <class... P, class... A>
void operator->*(void (*kernel)(P...), const Launch::Call<A...>& call) {
  const std::tuple<P...> parameters(call.arguments);
  run(call.grid, call.block, [&] { std::apply(kernel, parameters); });
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::indices().thread
#define blockIdx cuda_on_cpu::indices().block
#define blockDim cuda_on_cpu::indices().threads
#define gridDim cuda_on_cpu::indices().blocks

void __syncthreads();
void __threadfence();

// Relaxed, as CUDA's are: order between threads comes from fences and barriers alone.
inline unsigned atomicInc(unsigned* address, unsigned most) {
  cuda_on_cpu::before_atomic(address);
  const std::atomic_ref<unsigned> count(*address);
  unsigned old = count.load(std::memory_order_relaxed);
  while (!count.compare_exchange_weak(old, old >= most ? 0 : old + 1, std::memory_order_relaxed)) continue;
  cuda_on_cpu::after_atomic(address);
  return old;
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof(T));
  const unsigned lane = threadIdx.x % 32;
  raw = cuda_on_cpu::shuffle(mask, raw, lane + delta < 32 ? lane + delta : lane);
  std::memcpy(&value, &raw, sizeof(T));
  return value;
}
