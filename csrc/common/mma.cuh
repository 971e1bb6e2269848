// Products of a warp on the tensor cores. Of a product of 16 x 8 by 8 x 8 numbers a lane has, with g = lane / 4 and
// k = lane % 4:
//
//   a: (g, k), (g + 8, k), (g, k + 4), (g + 8, k + 4)     b: (k, g), (k + 4, g)
//   d: (g, 2k), (g, 2k + 1), (g + 8, 2k), (g + 8, 2k + 1)
#pragma once

#include "common/dtype.h"
#include "common/launch.cuh"

namespace tilewise {

// d += a b in tf32, which does not read the last 13 bits of an operand.
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(float_to_bits(a[0])), "r"(float_to_bits(a[1])), "r"(float_to_bits(a[2])), "r"(float_to_bits(a[3])),
        "r"(float_to_bits(b[0])), "r"(float_to_bits(b[1])));
#else
  emulator::multiply_tf32(d, a, b);
#endif
}

// To the nearest number of tf32.
__device__ __forceinline__ float to_tf32(float x) { return bits_to_float((float_to_bits(x) + 0x1000u) & 0xffffe000u); }

// A float as the sum of two numbers of tf32, to about its last bit.
struct Split {
  float high = 0.0f, low = 0.0f;

  Split() = default;
  __device__ __forceinline__ explicit Split(float x) : high(to_tf32(x)), low(x - high) {}
};

// d += a b in tf32, of operands that are rounded to it.
__device__ __forceinline__ void multiply_high(float (&d)[4], const Split (&a)[4], const float (&b_high)[2]) {
  const float a_high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
  multiply_tf32(d, a_high, b_high);
}

// d += a b as of floats, in three products, the small ones first: 2^-22 of each term is left out.
__device__ __forceinline__ void multiply_split(float (&d)[4], const Split (&a)[4], const float (&b_high)[2],
                                               const float (&b_low)[2]) {
  const float a_low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
  multiply_high(d, a, b_low);
  multiply_tf32(d, a_low, b_high);
  multiply_high(d, a, b_high);
}

// To tf32, the nearest; of two as near the larger one. What is not finite stays.
__device__ __forceinline__ float rounded_to_tf32(float x) {
  return ::fabsf(x) < infinity<float>() ? bits_to_float((float_to_bits(x) + 0x1000u) & 0xffffe000u) : x;
}

// d += a b in as many products as it takes: an operand that is not split has numbers of tf32.
template <bool kSplitsA, bool kSplitsB>
__device__ __forceinline__ void multiply(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  float a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Split split(a[i]);
    a_high[i] = kSplitsA ? split.high : a[i];
    a_low[i] = split.low;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Split split(b[i]);
    b_high[i] = kSplitsB ? split.high : b[i];
    b_low[i] = split.low;
  }
  if constexpr (kSplitsB) multiply_tf32(d, a_high, b_low);
  if constexpr (kSplitsA) multiply_tf32(d, a_low, b_high);
  multiply_tf32(d, a_high, b_high);
}

}  // namespace tilewise
