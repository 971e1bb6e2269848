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

// Floats as sums of two numbers of tf32, to about their last bit.
template <int kCount>
struct Split {
  float high[kCount], low[kCount];

  __device__ __forceinline__ void set(int i, float x) {
    high[i] = bits_to_float((float_to_bits(x) + 0x1000u) & 0xffffe000u);
    low[i] = x - high[i];
  }
};

// d += a b as of floats, in three products, the small ones first: 2^-22 of each term is left out.
__device__ __forceinline__ void multiply_split(float (&d)[4], const Split<4>& a, const Split<2>& b) {
  multiply_tf32(d, a.high, b.low);
  multiply_tf32(d, a.low, b.high);
  multiply_tf32(d, a.high, b.high);
}

}  // namespace tilewise
