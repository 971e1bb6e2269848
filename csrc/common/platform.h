// Macros that let one header serve g++ (several instruction sets), nvcc host and nvcc device code.
#pragma once

#include <cmath>
#include <cstdint>

// Functions have internal linkage and are always inlined: a translation unit compiled for AVX-512 can
// then never lend its copy to one that runs on an older processor. METHOD is for members, which are not static.
#if defined(__CUDACC__)
#define TILEWISE_FN static __host__ __device__ __forceinline__
#define TILEWISE_METHOD __host__ __device__ __forceinline__
#else
#define TILEWISE_FN static inline __attribute__((always_inline))
#define TILEWISE_METHOD inline __attribute__((always_inline))
#endif

namespace tilewise {

// Not std::numeric_limits: its functions are host functions to nvcc.
template <typename T>
TILEWISE_FN constexpr T infinity() {
  return static_cast<T>(__builtin_huge_val());
}

template <typename T>
TILEWISE_FN constexpr T quiet_nan() {
  return static_cast<T>(__builtin_nan(""));
}

}  // namespace tilewise
