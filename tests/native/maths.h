// Array functions over csrc/common, compiled like the kernels: once per instruction set.
#pragma once

#include <cstdint>

#include "common/gemm_tile.h"

namespace tilewise {

struct Softmax {
  float max, sum, weight_sum, weighted_dot, exp_dot;
  int64_t argmax;
};

struct Moments {
  float count, mean, m2, scale;
};

// `tiles` holds the first index of every tile and the length at the end; `order` is the order of the merges.
struct Maths {
  void (*map_float)(const char* function, const float* x, float* y, int64_t n);
  void (*half_to_float)(const uint16_t* x, float* y, int64_t n);
  void (*bfloat16_to_float)(const uint16_t* x, float* y, int64_t n);
  void (*float_to_half)(const float* x, uint16_t* y, int64_t n);
  void (*float_to_bfloat16)(const float* x, uint16_t* y, int64_t n);
  Softmax (*softmax)(const float* x, const float* c, const int64_t* tiles, const int64_t* order, int64_t n_tiles);
  Moments (*moments)(const float* x, const int64_t* tiles, const int64_t* order, int64_t n_tiles);
  void (*multiply_float)(const Product<float>&, int64_t begin, int64_t end);
  void (*multiply_double)(const Product<double>&, int64_t begin, int64_t end);
};
TILEWISE_DECLARE_KERNELS(Maths, maths)

}  // namespace tilewise
