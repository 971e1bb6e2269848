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
constexpr int kDepths = 16;             // of an operand at a time

// Where four numbers of a tile lie: lanes that read or write at once meet in no bank. Every bit of row and column has
// its own mask, so that of 16 depths and a lane's place among them each is computed alone.
__device__ __forceinline__ int spread(int column) { return column ^ column / 32 * 4; }
__device__ __forceinline__ int quad_at(int row, int column) {
  return row * kTile + (spread(column) ^ row / 4 % 2 * 20 ^ row / 8 % 2 * 8);
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

// The first of a lane's four columns of a right operand.
__device__ __forceinline__ int right_column() { return warp_of_thread() % 2 * 32 + lane_of_thread() / 4 * 4; }
__device__ __forceinline__ int lane_depth() { return lane_of_thread() % 4 * 4; }

// An operand whose depth runs along the columns of a tile, as it does in Rows{a} Rows{b} = a b^T. left() and right()
// are what a lane has of it: its address, once for a product.
template <bool kSplitsIt>
struct Rows {
  static constexpr bool kSplits = kSplitsIt;
  const float* tile;

  struct Lane {
    const float* row;
    int quad;

    __device__ __forceinline__ void load_row(int after, int depth, float (&value)[4]) const {
      const Quad four = load_quad(row + after * kTile + (quad ^ spread(depth)));
      memcpy(value, &four, sizeof(four));
    }
    template <int kCount>
    __device__ __forceinline__ void load(int depth, float (&value)[kCount][4]) const {
#pragma unroll
      for (int r = 0; r < kCount; ++r) load_row(r, depth, value[r]);
    }
  };

  __device__ __forceinline__ Lane left() const { return of_row(lane_row()); }
  __device__ __forceinline__ Lane right() const { return of_row(right_column()); }

 private:
  __device__ __forceinline__ Lane of_row(int row) const {
    return {tile + row * kTile, quad_at(row, lane_depth()) - row * kTile};
  }
};

// One whose depth runs down the rows: Columns{a} Columns{b} = a^T b.
template <bool kSplitsIt>
struct Columns {
  static constexpr bool kSplits = kSplitsIt;
  const float* tile;
  const float* factors = nullptr;  // of every depth, of a left operand

  struct Left {
    const float* pair;
    const float* factors;

    __device__ __forceinline__ void load(int depth, float (&value)[2][4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint64_t both = *reinterpret_cast<const uint64_t*>(pair + (depth + i) * kTile);
        value[0][i] = bits_to_float(static_cast<uint32_t>(both));
        value[1][i] = bits_to_float(static_cast<uint32_t>(both >> 32));
      }
      if (factors == nullptr) return;
      const Quad factor = load_quad(factors + depth);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) value[r][i] *= factor.value[i];
      }
    }
  };

  struct Right {
    const float* quad;

    __device__ __forceinline__ void load(int depth, float (&value)[4][4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Quad four = load_quad(quad + (depth + i) * kTile);
#pragma unroll
        for (int u = 0; u < 4; ++u) value[u][i] = four.value[u];
      }
    }
  };

  __device__ __forceinline__ Left left() const {
    const float* pair = tile + quad_at(lane_depth(), lane_row() / 4 * 4) + lane_row() % 4;
    return {pair, factors == nullptr ? nullptr : factors + lane_depth()};
  }
  __device__ __forceinline__ Right right() const { return {tile + quad_at(lane_depth(), right_column())}; }
};

// sum += left right, over so many depths; tiles have zeros up to the next 16.
template <typename Left, typename Right>
__device__ __forceinline__ void add_product(Product& sum, const Left& left, const Right& right, int depths) {
  const int end = depths < kTile ? depths : kTile;
  const auto of_left = left.left();
  const auto of_right = right.right();
#pragma unroll 1
  for (int depth = 0; depth < end; depth += kDepths) {
    float a[2][4], b[4][4];
    of_left.load(depth, a);
    of_right.load(depth, b);
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
  const auto of_left = left.left();
  auto of_right = right.right();
#pragma unroll 1
  for (int u = 0; u < 4; ++u, of_right.row += kTile) {
    float part[4] = {};
#pragma unroll 1
    for (int depth = 0; depth < end; depth += kDepths) {
      float a[2][4], b[4];
      of_left.load(depth, a);
      of_right.load_row(0, depth, b);
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        multiply<kSplits, kSplits>(part, {a[0][i], a[1][i], a[0][i + 1], a[1][i + 1]}, {b[i], b[i + 1]});
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i / 2] += takes(i / 2, i % 2 * 4 + u) ? part[i] : 0.0f;
  }
}

}  // namespace tilewise
