// Launching and addressing of kernels. Every launch goes through launch(), so that the same .cu files also
// compile as plain C++ against tests/gpu/cuda_emulator, which runs the threads of a block as fibers.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"
#endif

namespace tilewise {

inline constexpr int kWarp = 32;

#if defined(__CUDACC__)

// Asynchronous on `stream`; returns a CUDA error string, or null.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  if (grid.x == 0) return nullptr;  // nothing to do
  cudaError_t status = cudaSuccess;
  if (shared_bytes > 48 * 1024)  // more has to be asked for
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status == cudaSuccess) {
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    status = cudaGetLastError();
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// The `shared_bytes` of the launch.
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

#endif

// Of a number that one block writes while others read it: these have the old one or the new.
template <typename T>
__device__ __forceinline__ T read_relaxed(const T* from) {
#if defined(__CUDACC__)
  return *static_cast<const volatile T*>(from);
#else
  T value;
  __atomic_load(const_cast<T*>(from), &value, __ATOMIC_RELAXED);
  return value;
#endif
}

template <typename T>
__device__ __forceinline__ void write_relaxed(T* to, T value) {
#if defined(__CUDACC__)
  *static_cast<volatile T*>(to) = value;
#else
  __atomic_store_n(to, value, __ATOMIC_RELAXED);
#endif
}

// A grid of at least `blocks` blocks, numbered by flat_block(): one dimension ends at 2^31 - 1. An empty one of 0.
inline dim3 flat_grid(int64_t blocks) {
  constexpr int64_t kMaxX = 0x7fffffff;
  const int64_t y = blocks == 0 ? 1 : (blocks + kMaxX - 1) / kMaxX;
  return dim3(static_cast<unsigned>((blocks + y - 1) / y), static_cast<unsigned>(y));
}

__device__ __forceinline__ int64_t flat_block() { return static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x; }

}  // namespace tilewise
