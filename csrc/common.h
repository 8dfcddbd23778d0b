// What every op shares: element types, wide loads, the choice of the CPU's instruction set, threads, CUDA launches.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MINEGAN_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MINEGAN_HD inline __attribute__((always_inline))
#else
#define MINEGAN_HD inline
#endif

#if defined(__GNUC__) && defined(__x86_64__)
#define MINEGAN_X86 1
#define MINEGAN_INLINE inline __attribute__((always_inline))
#else
#define MINEGAN_X86 0
#define MINEGAN_INLINE inline
#endif

namespace minegan {

enum class DType : int { float32, float64, bfloat16, float16 };  // DTYPE_CODES in minegan_fast/ops/_op.py

template <class To, class From>
MINEGAN_HD To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

struct BFloat16 {
  uint16_t raw;
};

struct Float16 {
  uint16_t raw;
};

// Arithmetic runs in float, for doubles in double.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <class T>
using wide_t = typename Wide<T>::type;

MINEGAN_HD float widen(float v) { return v; }
MINEGAN_HD double widen(double v) { return v; }
MINEGAN_HD float widen(BFloat16 v) { return bits<float>(uint32_t(v.raw) << 16); }

MINEGAN_HD float widen(Float16 v) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(v.raw));
#else
  // Exponent and mantissa in float's places, then the exponents' biases made equal; subnormals come out right by the
  // same product.
  const uint32_t magnitude = uint32_t(v.raw & 0x7fff) << 13;
  const float finite = bits<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t result = magnitude >= (0x7c00u << 13) ? special : bits<uint32_t>(finite);
  return bits<float>(result | (uint32_t(v.raw & 0x8000) << 16));
#endif
}

template <class T>
MINEGAN_HD T narrow(wide_t<T> v);

template <>
MINEGAN_HD float narrow<float>(float v) {
  return v;
}

template <>
MINEGAN_HD double narrow<double>(double v) {
  return v;
}

template <>
MINEGAN_HD BFloat16 narrow<BFloat16>(float v) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
  const uint32_t u = bits<uint32_t>(v);
  const uint32_t nearest_even = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return {uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest_even)};
#endif
}

template <>
MINEGAN_HD Float16 narrow<Float16>(float v) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(v))};
#else
  const uint32_t u = bits<uint32_t>(v), magnitude = u & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // The last place of 0.5f is worth the smallest float16: the sum rounds a subnormal as it must be.
  const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - bits<uint32_t>(0.5f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  return {uint16_t((magnitude >= 0x477ff000 ? special : finite) | ((u >> 16) & 0x8000))};
#endif
}

// Calls f with a value of the C++ type that `dtype` names; only the value's type matters.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    case DType::bfloat16:
      return f(BFloat16{});
    case DType::float16:
      return f(Float16{});
  }
  throw std::invalid_argument("unknown dtype code " + std::to_string(int(dtype)));
}

// ---- CPU ----

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

inline Isa best_isa() {
#if MINEGAN_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

inline Isa& current_isa() {
  static Isa isa = best_isa();
  return isa;
}

#if MINEGAN_X86
template <class Loop, class... Args>
__attribute__((target("avx2,fma"))) void run_avx2(Args... args) {
  Loop::run(args...);
}
template <class Loop, class... Args>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"))) void run_avx512(
    Args... args) {
  Loop::run(args...);
}
#endif

// Runs Loop::run(args...), a MINEGAN_INLINE function, as compiled for the best instruction set of this CPU.
template <class Loop, class... Args>
void run(Args... args) {
#if MINEGAN_X86
  if (current_isa() == Isa::avx512) return run_avx512<Loop>(args...);
  if (current_isa() == Isa::avx2) return run_avx2<Loop>(args...);
#endif
  Loop::run(args...);
}

// GOMP_parallel of the OpenMP runtime that the process has loaded, torch's that is: null without one. Its threads spin
// for a while after each parallel region, and threads of our own would have to share the cores with them.
using OpenMP = void (*)(void (*region)(void*), void* data, unsigned threads, unsigned flags);
inline OpenMP openmp() {
#if defined(__unix__) || defined(__APPLE__)
  static const OpenMP found = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

// Calls f(begin, end) on consecutive ranges that cover [0, count), one for each of `threads` threads.
template <class F>
void parallel_for(int64_t count, int threads, const F& f) {
  if (count <= 0) return;
  const int64_t share = (count + threads - 1) / threads;
  if (share == count) return f(0, count);
  std::atomic<int64_t> next{0};
  const auto take = [&] {  // until no range is left: there may be fewer threads than were asked for
    for (int64_t begin; (begin = next.fetch_add(share)) < count;) f(begin, std::min(begin + share, count));
  };
  if (const OpenMP parallel = openmp())
    return parallel([](void* data) { (*static_cast<decltype(take)*>(data))(); }, (void*)&take, unsigned(threads), 0);
  std::vector<std::thread> others;
  try {
    while (int64_t(others.size()) + 1 < threads) others.emplace_back(take);
  } catch (const std::system_error&) {
    // No more threads to be had: the rest runs here.
  }
  take();
  for (auto& other : others) other.join();
}

// ---- CUDA ----

#ifdef __CUDACC__

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes `device` current for the enclosing scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Why `device` cannot run a kernel, "" where it can: the driver may be too old, or no machine code be for the device.
template <class Kernel>
std::string problem_of(Kernel* kernel, int device) {
  try {
    DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    return "";
  } catch (const std::runtime_error& error) {
    cudaGetLastError();  // else a launch on another device would report this error as its own
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);  // stays 0 without a driver
    cudaRuntimeGetVersion(&runtime);
    const auto text = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    return std::string(error.what()) + "; the kernels need CUDA " + text(runtime) + ", the driver " +
           (driver ? "has " + text(driver) : "is missing");
  }
}

// V elements that travel in one access of up to 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

template <class T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}

template <class T, int V>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }  // null is aligned

#endif

}  // namespace minegan
