// Products of tiles on the tensor cores (CUDA). A tile is 64 x 64 floats of shared memory. Of a product each of eight
// warps has 16 rows and 32 columns, and of these a lane two rows and eight columns, side by side: with g = lane / 4 and
// k = lane % 4 columns 8 k + c. Of 16 depths of an operand it takes 4 k + i, of its 32 columns 4 g + u: these are quads
// of a tile, whichever way the depth runs, and a sum may go over its depths in any order.
#pragma once

#include "common/mma.cuh"
#include "common/vector.cuh"

namespace tilewise {

constexpr int kThreads = 256;
constexpr int kTile = 64;  // tokens, features or values
constexpr int kTileFloats = kTile * kTile;
constexpr int kRows = 2, kColumns = 8;  // of a lane

// Where four numbers of a tile lie: lanes that read or write at once meet in no bank.
__device__ __forceinline__ int quad_at(int row, int column) {
  return row * kTile + (column ^ column / 32 * 4 ^ row / 4 % 2 * 20 ^ row / 8 % 2 * 8);
}

__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }
// The first of a lane's rows and columns of a product: lanes 4 apart have rows 4 apart.
__device__ __forceinline__ int lane_row() {
  const int g = lane_of_thread() / 4;
  return warp_of_thread() / 2 * 16 + g / 4 * 8 + g % 2 * 4 + g / 2 % 2 * 2;
}
__device__ __forceinline__ int lane_column() { return warp_of_thread() % 2 * 32 + lane_of_thread() % 4 * kColumns; }

// A product, as a lane has it: of m16n8k8 product u the columns u and 4 + u.
struct Product {
  float part[4][4] = {};

  __device__ __forceinline__ float& at(int row, int column) { return part[column % 4][row * 2 + column / 4]; }

  __device__ __forceinline__ void copy_to(float (&rows)[kRows][kColumns]) {
    each([&](int r, int c, float& x) { rows[r][c] = x; });
  }

  template <typename Function>
  __device__ __forceinline__ void each(Function f) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) f(r, c, at(r, c));
    }
  }

  __device__ __forceinline__ void load(const float* tile) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; c += 4) {
        const Quad quad = load_quad(tile + quad_at(lane_row() + r, lane_column() + c));
#pragma unroll
        for (int u = 0; u < 4; ++u) at(r, c + u) = quad.value[u];
      }
    }
  }

  __device__ __forceinline__ void store(float* tile) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; c += 4)
        store_quad(tile + quad_at(lane_row() + r, lane_column() + c),
                   {at(r, c), at(r, c + 1), at(r, c + 2), at(r, c + 3)});
    }
  }
};

// An operand whose depth runs along the columns of a tile, as it does in Rows{a} Rows{b} = a b^T.
template <bool kSplitsIt>
struct Rows {
  static constexpr bool kSplits = kSplitsIt;
  const float* tile;

  __device__ __forceinline__ void load_left(int depth, float (&value)[2][4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) load_row(lane_row() + r, depth, value[r]);
  }
  __device__ __forceinline__ void load_right(int depth, float (&value)[4][4]) const {
#pragma unroll
    for (int u = 0; u < 4; ++u) load_column(u, depth, value[u]);
  }
  __device__ __forceinline__ void load_column(int u, int depth, float (&value)[4]) const {
    load_row(warp_of_thread() % 2 * 32 + lane_of_thread() / 4 * 4 + u, depth, value);
  }

 private:
  __device__ __forceinline__ void load_row(int row, int depth, float (&value)[4]) const {
    const Quad quad = load_quad(tile + quad_at(row, depth + lane_of_thread() % 4 * 4));
    memcpy(value, &quad, sizeof(quad));
  }
};

// One whose depth runs down the rows: Columns{a} Columns{b} = a^T b.
template <bool kSplitsIt>
struct Columns {
  static constexpr bool kSplits = kSplitsIt;
  const float* tile;
  const float* factors = nullptr;  // of every depth, of a left operand

  __device__ __forceinline__ void load_left(int depth, float (&value)[2][4]) const {
    const int column = lane_row(), at = depth + lane_of_thread() % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = tile + quad_at(at + i, column / 4 * 4) + column % 4;
      const float factor = factors == nullptr ? 1.0f : factors[at + i];
#pragma unroll
      for (int r = 0; r < 2; ++r) value[r][i] = factors == nullptr ? pair[r] : factor * pair[r];
    }
  }
  __device__ __forceinline__ void load_right(int depth, float (&value)[4][4]) const {
    const int column = warp_of_thread() % 2 * 32 + lane_of_thread() / 4 * 4, at = depth + lane_of_thread() % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Quad quad = load_quad(tile + quad_at(at + i, column));
#pragma unroll
      for (int u = 0; u < 4; ++u) value[u][i] = quad.value[u];
    }
  }
};

// sum += left right, over so many depths; tiles have zeros up to the next 16.
template <typename Left, typename Right>
__device__ __forceinline__ void add_product(Product& sum, const Left& left, const Right& right, int depths) {
  const int end = depths < kTile ? depths : kTile;
#pragma unroll 1
  for (int depth = 0; depth < end; depth += 16) {
    float a[2][4], b[4][4];
    left.load_left(depth, a);
    right.load_right(depth, b);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
#pragma unroll
      for (int u = 0; u < 4; ++u)
        multiply<Left::kSplits, Right::kSplits>(sum.part[u], {a[0][i], a[1][i], a[0][i + 1], a[1][i + 1]},
                                                {b[u][i], b[u][i + 1]});
    }
  }
}

// sums[r] += row r of left right^T over a lane's columns c where takes(r, c), with few registers.
template <bool kSplits, typename Takes>
__device__ __forceinline__ void add_row_sums(float (&sums)[kRows], const Rows<kSplits>& left,
                                             const Rows<kSplits>& right, int depths, const Takes& takes) {
  const int end = depths < kTile ? depths : kTile;
#pragma unroll 1
  for (int u = 0; u < 4; ++u) {
    float part[4] = {};
#pragma unroll 1
    for (int depth = 0; depth < end; depth += 16) {
      float a[2][4], b[4];
      left.load_left(depth, a);
      right.load_column(u, depth, b);
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        multiply<kSplits, kSplits>(part, {a[0][i], a[1][i], a[0][i + 1], a[1][i + 1]}, {b[i], b[i + 1]});
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i / 2] += takes(i / 2, i % 2 * 4 + u) ? part[i] : 0.0f;
  }
}

}  // namespace tilewise
