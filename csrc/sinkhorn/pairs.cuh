// Tiles of 64 x 64 pairs on CUDA. A thread of a block of 256 has 4 x 4 pairs: rows 4 (t / 16) + r, columns 4 (t % 16) +
// c. Scores are factor z + offset_i + offset_j with offset = (potential - s) / epsilon + log marginal.
#pragma once

#include <type_traits>

#include "common/vector.cuh"
#include "sinkhorn/sinkhorn_launch.h"

namespace tilewise {

constexpr int kThreads = 256;
constexpr int kTile = kTileRows;
constexpr int kPitch = kTile + 4;  // of shared tiles: keeps groups of 4 on 16-byte boundaries
constexpr int kDepth = 32;         // features at a time

__device__ __forceinline__ int own_row() { return static_cast<int>(threadIdx.x) / 16 * 4; }
__device__ __forceinline__ int own_column() { return static_cast<int>(threadIdx.x) % 16 * 4; }

// The first `kDepth` features of up to 64 points from `first` on, by feature; 0 where there are none.
__device__ __forceinline__ void stage_points(const float* points, int64_t left, int64_t features, int64_t feature,
                                             float* out) {
  for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
    const int k = i % kDepth, point = i / kDepth;
    const bool inside = point < left && feature + k < features;
    out[k * kPitch + point] = inside ? points[point * features + feature + k] : 0.0f;
  }
}

// z += <x, y>, or what a cost accumulates, over all features of a tile of points. shared: 2 kDepth kPitch.
struct InnerProduct {
  static __device__ __forceinline__ float accumulate(float z, float x, float y) { return fmaf(x, y, z); }
};
template <typename Cost>
__device__ __forceinline__ void add_features(const float* x, const float* y, int64_t rows_left, int64_t columns_left,
                                             int64_t features, float* shared, float (&z)[4][4]) {
  float* of_x = shared;
  float* of_y = shared + kDepth * kPitch;
  for (int64_t feature = 0; feature < features; feature += kDepth) {
    stage_points(x, rows_left, features, feature, of_x);
    stage_points(y, columns_left, features, feature, of_y);
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kDepth; ++k) {
      const Quad a = load_quad(of_x + k * kPitch + own_row()), b = load_quad(of_y + k * kPitch + own_column());
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) z[r][c] = Cost::accumulate(z[r][c], a.value[r], b.value[c]);
      }
    }
    __syncthreads();
  }
}

// z of the tile at (row, column) of a problem; beyond a matrix it is infinite. shared: kTile kPitch.
template <typename Cost>
__device__ __forceinline__ void load_pairs(const Pairs<float>& pairs, int64_t problem, int64_t row, int64_t column,
                                           float* shared, float (&z)[4][4]) {
  const int64_t rows_left = pairs.rows - row, columns_left = pairs.columns - column;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) z[r][c] = 0.0f;
  }
  if constexpr (kIsMatrix<Cost>) {
    const float* matrix =
        pairs.matrix + problem * pairs.batch_stride + row * pairs.row_stride + column * pairs.column_stride;
    const bool by_rows = pairs.column_stride <= pairs.row_stride;  // neighbours in memory go to neighbouring threads
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int r = by_rows ? i / kTile : i % kTile, c = by_rows ? i % kTile : i / kTile;
      const bool inside = r < rows_left && c < columns_left;
      shared[r * kPitch + c] = inside ? matrix[r * pairs.row_stride + c * pairs.column_stride] : infinity<float>();
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const Quad quad = load_quad(shared + (own_row() + r) * kPitch + own_column());
#pragma unroll
      for (int c = 0; c < 4; ++c) z[r][c] = quad.value[c];
    }
    __syncthreads();
  } else {
    const int64_t features = pairs.features;
    const float* x = pairs.x + (problem * pairs.rows + row) * features;
    const float* y = pairs.y + (problem * pairs.columns + column) * features;
    using Feature = std::conditional_t<Cost::kByProducts, InnerProduct, Cost>;
    add_features<Feature>(x, y, rows_left, columns_left, features, shared, z);
    if (features == 0) __syncthreads();  // else there was one: callers read what they staged before
    if constexpr (!Cost::kByProducts) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) z[r][c] = Cost::finish(z[r][c]);
      }
    }
  }
}

template <typename Cost>
__device__ __forceinline__ float factor_of(float inverse) {
  return Cost::kByProducts ? 2.0f * inverse : -inverse;
}

// Of one side: potentials, squares or null, marginal or null (ones).
struct Side {
  const float* potential;
  const float* squares;
  const float* marginal;

  __device__ __forceinline__ float offset(int64_t at, float inverse) const {
    const float s = squares != nullptr ? squares[at] : 0.0f;
    return (potential[at] - s) * inverse + (marginal != nullptr ? ::logf(marginal[at]) : 0.0f);
  }
};

// offset of up to 64 columns, -inf beyond.
__device__ __forceinline__ void stage_offsets(const Side& side, int64_t first, int64_t left, float inverse,
                                              float* out) {
  if (threadIdx.x < kTile)
    out[threadIdx.x] = threadIdx.x < left ? side.offset(first + threadIdx.x, inverse) : -infinity<float>();
}

// Two sums of exp(score - top) as one, with the lane at this distance.
__device__ __forceinline__ void merge_over_lanes(float& top, float& total, int lanes) {
  const float other_top = __shfl_xor_sync(0xffffffffu, top, lanes);
  const float other_total = __shfl_xor_sync(0xffffffffu, total, lanes);
  const float above = fmaxf(top, other_top), finite = above > -infinity<float>() ? above : 0.0f;
  total = total * fast_exp(top - finite) + other_total * fast_exp(other_top - finite);
  top = above;
}

// Over the 16 threads of a row.
template <typename Function>
__device__ __forceinline__ void over_row_threads(Function f) {
#pragma unroll
  for (int lanes = 8; lanes > 0; lanes /= 2) f(lanes);
}

}  // namespace tilewise
