// Two faults that a sanitizer must find before its silence about the real kernels means anything:
//   planted memcheck    a write past the end of an allocation
//   planted racecheck   two warps that write and read shared memory without a barrier between them
#include <cstdio>
#include <cstring>

__global__ void past_the_end(int* data, int count) { data[count + threadIdx.x] = 1; }

__global__ void no_barrier(int* data) {
  __shared__ int shared[64];
  shared[threadIdx.x] = int(threadIdx.x);
  data[threadIdx.x] = shared[63 - threadIdx.x];
}

int main(int argc, char** argv) {
  int* data = nullptr;
  if (argc != 2 || cudaMalloc(&data, 64 * sizeof(int)) != cudaSuccess) return 2;
  if (!std::strcmp(argv[1], "memcheck"))
    past_the_end<<<1, 64>>>(data, 64);
  else
    no_barrier<<<1, 64>>>(data);
  std::printf("%s: %s\n", argv[1], cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
