// What the kernels of mala share (CUDA): tiles of float32 in shared memory, products of them in registers, who a block
// is and the tokens and sums that it sees.
#pragma once

#include "common/math.h"
#include "common/team.cuh"
#include "mala/mala.h"
#include "rows/rows.cuh"

namespace tilewise {

constexpr int kThreads = 256;
constexpr int kC = kMalaChunk;  // tokens of a chunk
constexpr int kD = 32;          // features of a tile

// A (32, kColumns) product in registers: thread t has rows 2 (t / 16), + 1 and columns t % 16 + 16 u.
template <int kColumns>
struct Tile {
  static constexpr int kPerThread = kColumns / 16;
  float value[2][kPerThread] = {};

  // += a b over `depth`; a[i, k] and b[k, j] anywhere
  __device__ __forceinline__ void add(const float* a, int a_row, int a_depth, const float* b, int b_depth, int b_column,
                                      int depth) {
    const int row = threadIdx.x / 16 * 2;
    const int column = threadIdx.x % 16;
    for (int k = 0; k < depth; ++k) {
      const float first = a[row * a_row + k * a_depth];
      const float second = a[(row + 1) * a_row + k * a_depth];
#pragma unroll
      for (int u = 0; u < kPerThread; ++u) {
        const float x = b[k * b_depth + (column + 16 * u) * b_column];
        value[0][u] = fmaf(first, x, value[0][u]);
        value[1][u] = fmaf(second, x, value[1][u]);
      }
    }
  }

  template <typename Function>
  __device__ __forceinline__ void each(Function f) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int u = 0; u < kPerThread; ++u)
        f(static_cast<int>(threadIdx.x) / 16 * 2 + r, static_cast<int>(threadIdx.x) % 16 + 16 * u, value[r][u]);
    }
  }
};

// f(row, column) for the elements of a (rows, columns) tile, over the threads.
template <typename Function>
__device__ __forceinline__ void for_tile(int rows, int columns, Function f) {
  for (int i = threadIdx.x; i < rows * columns; i += kThreads) f(i / columns, i % columns);
}

__device__ __forceinline__ float phi(float x) { return x > 0.0f ? x + 1.0f : ::expf(x); }

// The tokens [begin, begin + length) of one head of one sequence, from the chunk at `first` on.
template <typename Storage>
struct Head {
  const Storage* rows;
  int64_t stride;
  int64_t left;  // tokens from the chunk's first to the sequence's end

  __device__ float at(int token, int64_t column, int64_t width) const {
    return token < left && column < width ? to_float(rows[token * stride + column]) : 0.0f;
  }
};

struct Sequence {
  int64_t begin;
  int64_t length;
};

__device__ __forceinline__ Sequence sequence_of(const int64_t* bounds, int64_t index, int64_t tokens) {
  if (bounds == nullptr) return {0, tokens};
  const auto within = [&](int64_t at, int64_t low) { return at < low ? low : at > tokens ? tokens : at; };
  const int64_t begin = within(bounds[index], 0);
  return {begin, within(bounds[index + 1], begin) - begin};
}

template <typename Storage>
__device__ Head<Storage> head_of(const TokenTensor& tensor, const int64_t* bounds, int64_t index, int64_t head,
                                 Sequence sequence, int64_t first) {
  const int64_t batch = bounds == nullptr ? index : 0;
  const Storage* data = static_cast<const Storage*>(tensor.data);
  return {data + batch * tensor.batch + head * tensor.head + (sequence.begin + first) * tensor.token, tensor.token,
          sequence.length - first};
}

// phi of a (32, 32) tile of features and its rotation, 0 beyond the tokens and the features.
template <typename Storage>
__device__ void load_features(const MalaCall& call, const Head<Storage>& head, int64_t first, int64_t feature, float* f,
                              float* rotated) {
  for_tile(kC, kD, [&](int i, int j) {
    const int64_t d = feature + j;
    const bool inside = i < head.left && d < call.features;
    f[i * kD + j] = inside ? phi(head.at(i, d, call.features)) : 0.0f;
    if (call.cos == nullptr) return;
    float result = 0.0f;
    if (inside) {
      const int64_t angle = (first + i) * (call.features / 2) + d / 2;
      const float other = phi(head.at(i, d ^ 1, call.features));
      result = call.cos[angle] * f[i * kD + j] + (d % 2 == 0 ? -call.sin[angle] : call.sin[angle]) * other;
    }
    rotated[i * kD + j] = result;
  });
}

template <typename Storage>
__device__ void load_values(const Head<Storage>& head, int64_t column, int64_t width, int columns, float* out) {
  for_tile(kC, columns, [&](int i, int j) { out[i * columns + j] = head.at(i, column + j, width); });
}

// A (32, columns) tile of S, 0 outside.
__device__ __forceinline__ void load_sums(const float* s, const MalaCall& call, int64_t feature, int64_t value,
                                          int columns, float* out) {
  for_tile(kD, columns, [&](int i, int j) {
    const int64_t d = feature + i, v = value + j;
    out[i * columns + j] = d < call.features && v < call.values ? s[d * call.values + v] : 0.0f;
  });
}

__device__ __forceinline__ MalaSums<float> sums_at(const MalaSums<float>& sums, const MalaCall& call, int64_t line) {
  return {sums.s + line * call.features * call.values, sums.z + line * call.features, sums.u + line * call.values};
}

__device__ __forceinline__ int64_t chunks_of(int64_t tokens) { return (tokens + kC - 1) / kC; }

// What the kernels over chunks of queries share: who they are and the sums that they see.
template <typename Storage>
struct QueryChunk {
  int64_t index, head, first, line;  // line: of the sums
  Sequence queries, keys;
  Head<Storage> q, k, v, grad_out;

  __device__ QueryChunk(const MalaCall& call, int64_t place) {
    const int64_t chunks = chunks_of(call.queries);
    const int64_t chunk = place % chunks;
    index = place / chunks / call.heads;
    head = place / chunks % call.heads;
    first = chunk * kC;
    queries = sequence_of(call.q_bounds, index, call.queries);
    keys = sequence_of(call.k_bounds, index, call.keys);
    const int64_t key_head = head / (call.heads / call.key_heads);
    line = index * call.key_heads + key_head;
    if (call.causal) line = line * chunks + chunk;
    q = head_of<Storage>(call.q, call.q_bounds, index, head, queries, first);
    k = head_of<Storage>(call.k, call.k_bounds, index, key_head, keys, first);
    v = head_of<Storage>(call.v, call.k_bounds, index, key_head, keys, first);
    grad_out = head_of<Storage>(call.grad_out, call.q_bounds, index, head, queries, first);
  }

  __device__ bool empty() const { return first >= queries.length; }

  __device__ float seen(const MalaCall& call, int i) const {
    const int64_t count = call.causal ? call.seen + first + i + 1 : keys.length;
    return static_cast<float>(count > 0 ? count : 1);
  }
};

// Running sums down the rows of a (32, columns) tile, from `start`; backwards those up to the row from the last.
__device__ __forceinline__ void accumulate_rows(float* tile, int columns, const float* start, int64_t column,
                                                int64_t width, bool back) {
  if (static_cast<int>(threadIdx.x) >= columns) return;
  float sum = start != nullptr && column + threadIdx.x < width ? start[column + threadIdx.x] : 0.0f;
  for (int step = 0; step < kC; ++step) {
    float* at = tile + (back ? kC - 1 - step : step) * columns + threadIdx.x;
    sum += *at;
    *at = sum;
  }
}

// Rows of a (32, width) product with a vector per row: out[i] += sum_j a[i, j] b[i, j]; eight threads a row.
__device__ __forceinline__ void add_row_dots(const float* a, const float* b, int columns, float* out) {
  const int row = threadIdx.x / 8, lane = threadIdx.x % 8;
  float sum = 0.0f;
  for (int j = lane; j < columns; j += 8) sum += a[row * columns + j] * b[row * columns + j];
  sum = over_lanes<8>(sum, Plus{});
  if (lane == 0) out[row] += sum;
}

inline int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

constexpr size_t kTileBytes = kC * kD * sizeof(float);

}  // namespace tilewise
