// What the kernels of mala share (CUDA): how tokens and sums come into tiles, who a block is and the sums that it sees.
#pragma once

#include <new>

#include "common/math.h"
#include "common/team.cuh"
#include "mala/mala.h"
#include "mala/mala_products.cuh"
#include "rows/rows.cuh"

namespace tilewise {

static_assert(kTile == kMalaChunk);

// Which operands of a product are split in two: tokens of 16 bits are numbers of tf32; what is computed of them is
// rounded to that where the output has fewer bits.
template <typename Storage>
struct Precision {
  static constexpr bool kRounds = std::is_same_v<Storage, BFloat16>;
  static constexpr bool kSplitsTokens = std::is_same_v<Storage, float>, kSplitsOthers = !kRounds;
};

template <typename Storage>
using TokenRows = Rows<Precision<Storage>::kSplitsTokens>;
template <typename Storage>
using TokenColumns = Columns<Precision<Storage>::kSplitsTokens>;
template <typename Storage>
using OtherRows = Rows<Precision<Storage>::kSplitsOthers>;
template <typename Storage>
using OtherColumns = Columns<Precision<Storage>::kSplitsOthers>;

// As an operand of a product.
template <typename Storage>
__device__ __forceinline__ float operand(float x) {
  return Precision<Storage>::kRounds ? rounded_to_tf32(x) : x;
}

template <typename Storage>
__device__ __forceinline__ float phi(float x) {
  const float below = std::is_same_v<Storage, float> ? ::expf(x) : fast_exp(x);
  return x > 0.0f ? x + 1.0f : below;
}

// Tokens of one head, from the first of a block's on.
template <typename Storage>
struct Head {
  const Storage* rows;
  int64_t stride;
  int length;

  __device__ __forceinline__ bool by_vectors() const {
    return is_vector_aligned(rows) && stride * static_cast<int64_t>(sizeof(Storage)) % 16 == 0;
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

// Eight columns of two rows of a tile, so many rows apart, are a thread's: of a tile that it fills, or of a product.
struct Spot {
  int row, apart, column;
};

__device__ __forceinline__ Spot staged_spot() {
  return {static_cast<int>(threadIdx.x) / 8, kTile / kRows, static_cast<int>(threadIdx.x) % 8 * kColumns};
}
__device__ __forceinline__ Spot product_spot() { return {lane_row(), 1, lane_column()}; }

// Of a (tokens, width) matrix from (first, column) on; `outside` beyond it. All loads are on their way before one is
// waited for.
template <typename Storage>
__device__ __forceinline__ void load_spot(const Head<Storage>& head, int first, int column, int64_t width,
                                          float outside, const Spot& spot, float (&x)[kRows][kColumns]) {
  const int left = head.length - first - spot.row;
  const int columns = static_cast<int>(width) - column - spot.column;
  const Storage* from = head.rows + (first + spot.row) * head.stride + column + spot.column;
  Run<Storage, kColumns> run[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) from_float(outside, run[r].value[c]);
  }
  if (head.by_vectors() && columns >= kColumns) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r * spot.apart < left) run[r] = load_vectors<false, kColumns>(from + r * spot.apart * head.stride);
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (r * spot.apart < left && c < columns) run[r].value[c] = from[r * spot.apart * head.stride + c];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) widen(run[r], x[r]);
}

// phi of them, 0 outside.
template <typename Storage>
__device__ __forceinline__ void load_features(const MalaCall& call, const Head<Storage>& head, int first, int feature,
                                              const Spot& spot, float (&f)[kRows][kColumns]) {
  load_spot(head, first, feature, call.features, -infinity<float>(), spot, f);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) f[r][c] = phi<Storage>(f[r][c]);
  }
}

__device__ __forceinline__ void stage_spot(const float (&x)[kRows][kColumns], float* tile) {
  const Spot spot = staged_spot();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; c += 4)
      store_quad(tile + quad_at(spot.row + r * spot.apart, spot.column + c),
                 {x[r][c], x[r][c + 1], x[r][c + 2], x[r][c + 3]});
  }
}

// The same as an operand of products.
template <typename Storage>
__device__ __forceinline__ void stage_operand(float (&x)[kRows][kColumns], float* tile) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[r][c] = operand<Storage>(x[r][c]);
  }
  stage_spot(x, tile);
}

// R x, or R^T x, of what a thread itself has put into its spot of a tile; the block's tokens begin at `begin` of their
// sequence and end after `length`. A quad at a time: registers are few.
template <bool kRounds>
__device__ __forceinline__ void rotate_spot(const MalaCall& call, int64_t begin, int length, int first, int feature,
                                            bool back, const Spot& spot, float* tile) {
  const int pairs = static_cast<int>(call.features / 2);
#pragma unroll 1
  for (int i = 0; i < kRows * kColumns / 4; ++i) {
    const int row = spot.row + i / 2 * spot.apart, column = spot.column + i % 2 * 4, pair = (feature + column) / 2;
    if (first + row >= length || pair >= pairs) continue;
    const int64_t at = (begin + first + row) * pairs + pair;
    Quad x = load_quad(tile + quad_at(row, column));
#pragma unroll
    for (int of_quad = 0; of_quad < 2; ++of_quad) {
      if (pair + of_quad >= pairs) continue;
      const float cos = call.cos[at + of_quad], sin = back ? -call.sin[at + of_quad] : call.sin[at + of_quad];
      const float even = x.value[2 * of_quad], odd = x.value[2 * of_quad + 1];
      const float turned[2] = {cos * even - sin * odd, sin * even + cos * odd};
#pragma unroll
      for (int of_pair = 0; of_pair < 2; ++of_pair)
        x.value[2 * of_quad + of_pair] = kRounds ? rounded_to_tf32(turned[of_pair]) : turned[of_pair];
    }
    store_quad(tile + quad_at(row, column), x);
  }
}

// R f of what stage_features() staged, by the same threads.
template <typename Storage>
__device__ __forceinline__ void rotate_features(const MalaCall& call, int64_t begin, int length, int first, int feature,
                                                float* tile) {
  rotate_spot<Precision<Storage>::kRounds>(call, begin, length, first, feature, false, staged_spot(), tile);
}

// f of a chunk, 0 outside.
template <typename Storage>
__device__ __forceinline__ void stage_features(const MalaCall& call, const Head<Storage>& head, int first, int feature,
                                               float* tile) {
  float f[kRows][kColumns];
  load_features(call, head, first, feature, staged_spot(), f);
  stage_operand<Storage>(f, tile);
}

template <typename Storage>
__device__ __forceinline__ void stage_values(const Head<Storage>& head, int first, int value, int64_t width,
                                             float* tile) {
  float x[kRows][kColumns];
  load_spot(head, first, value, width, 0.0f, staged_spot(), x);
  stage_spot(x, tile);
}

// A tile of S, 0 outside.
template <typename Storage>
__device__ __forceinline__ void stage_sums(const MalaCall& call, const float* s, int feature, int value, float* tile) {
  const int left = static_cast<int>(call.features) - feature;
  float x[kRows][kColumns];
  load_spot(Head<float>{s + feature * call.values, call.values, left}, 0, value, call.values, 0.0f, staged_spot(), x);
  stage_operand<Storage>(x, tile);
}

// A tile of S += left right.
template <typename Storage, typename Left, typename Right>
__device__ __forceinline__ void add_to_sums(const Left& left, const Right& right, float* tile) {
  Product sums;
  sums.load(tile);
  add_product(sums, left, right, kTile);
  sums.each([](int, int, float& x) { x = operand<Storage>(x); });
  sums.store(tile);
}

// 64 numbers of Z or U from `first` on.
__device__ __forceinline__ void stage_vector(const float* from, int first, int64_t width, float* out) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < kTile) out[i] = first + i < width ? from[first + i] : 0.0f;
}

// Down the columns of a tile: out[j] += sum of rows' weights[i] tile[i, j], or without weights; column by a thread.
__device__ __forceinline__ void add_columns(const float* tile, const float* weights, int column, float* out) {
  float sums[4] = {};
#pragma unroll 4
  for (int row = 0; row < kTile; row += 4) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float x = tile[quad_at(row + r, column / 4 * 4) + column % 4];
      sums[r] += weights == nullptr ? x : weights[row + r] * x;
    }
  }
  out[column] += (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// dots[r] += <a thread's columns of row r, vector>
__device__ __forceinline__ void add_dots(const float (&x)[kRows][kColumns], const float* vector, float (&dots)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) dots[r] = fmaf(x[r][c], vector[c], dots[r]);
  }
}

// Of staged rows, over the eight threads that have one; or added to what is there.
__device__ __forceinline__ void store_dots(const float (&dots)[kRows], float* out, bool adds) {
  const Spot spot = staged_spot();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float sum = over_lanes<8>(dots[r], Plus{});
    float* at = out + spot.row + r * spot.apart;
    if (spot.column == 0) *at = adds ? *at + sum : sum;
  }
}

// The same of rows of a product: parts[half of the columns][row], over the four lanes that have one.
__device__ __forceinline__ void store_row_sums(const float (&sums)[kRows], float* parts, bool adds) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float sum = over_lanes<4>(sums[r], Plus{});
    float* at = parts + warp_of_thread() % 2 * kTile + lane_row() + r;
    if (lane_of_thread() % 4 == 0) *at = adds ? *at + sum : sum;
  }
}

// A lane's part of a product, rounded, to the tokens that are left of a block's from `first` on.
template <typename Storage>
__device__ __forceinline__ void store_product(Product& product, Storage* to, int64_t stride, int left, int64_t column,
                                              int64_t width) {
  const Spot own = product_spot();
  const int columns = static_cast<int>(width) - column - own.column;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (own.row + r >= left) return;
    Storage* at = to + (own.row + r) * stride + column + own.column;
    if (columns >= kColumns && is_vector_aligned(at)) {
#pragma unroll
      for (int c = 0; c < kColumns; c += kVector<Storage>) {
        float part[kVector<Storage>];
#pragma unroll
        for (int i = 0; i < kVector<Storage>; ++i) part[i] = product.at(r, c + i);
        store_vectors(at + c, narrow<Storage>(part));
      }
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c < columns) from_float(product.at(r, c), at[c]);
      }
    }
  }
}

__device__ __forceinline__ MalaSums<float> sums_at(const MalaSums<float>& sums, const MalaCall& call, int64_t line) {
  return {sums.s + line * call.features * call.values, sums.z + line * call.features, sums.u + line * call.values};
}

TILEWISE_FN int64_t tiles(int64_t size, int64_t tile = kTile) { return (size + tile - 1) / tile; }

// Who a block is: a run of the tokens of one head of one sequence. With as many queries as keys both have the same.
struct Block {
  int64_t index, head, key_head, batch;
  int64_t run, line;          // of the sequence, of all heads
  int64_t first;              // token of the sequence
  int queries = 0, keys = 0;  // tokens from there to the end of the run
  Sequence of_queries, of_keys;

  __device__ Block(const MalaCall& call, int64_t place, int64_t tokens, int64_t heads) {
    const int64_t runs = tiles(tokens, call.run);
    run = place % runs;
    line = place / runs;
    index = line / heads;
    head = line % heads;
    key_head = head / (heads / call.key_heads);
    first = run * call.run;
    if (index >= call.sequences) return;
    of_queries = sequence_of(call.q_bounds, index, call.queries);
    of_keys = sequence_of(call.k_bounds, index, call.keys);
    batch = call.q_bounds == nullptr ? index : 0;
    const auto left = [&](const Sequence& sequence) {
      const int64_t tokens = sequence.length - first;
      return static_cast<int>(tokens < 0 ? 0 : tokens < call.run ? tokens : call.run);
    };
    queries = left(of_queries);
    keys = left(of_keys);
  }

  // Where the block's tokens of a head begin.
  template <typename T>
  __device__ __forceinline__ T* tokens_of(const TokenTensor& tensor, int64_t head, const Sequence& sequence) const {
    return static_cast<T*>(tensor.data) + batch * tensor.batch + head * tensor.head +
           (sequence.begin + first) * tensor.token;
  }

  // The first kind of its queries; the others follow coefficient_count() apart.
  __device__ __forceinline__ float* coefficients_of(const MalaCall& call, const Sequence& sequence) const {
    return call.coefficients + (batch * call.heads + head) * call.queries + sequence.begin + first;
  }
};

// Where a block reads, in shared memory: registers are few. `queries_at`: where those of a chunk lie as tokens of
// queries; the block of a key gradient finds them among its keys.
template <typename Storage>
struct Sources {
  Block block;
  MalaSums<float> sums;
  Head<Storage> q, k, v, grad_out;

  __device__ Sources(const MalaCall& call, const Block& block, const MalaSums<float>& sums, const Sequence& queries_at,
                     int queries)
      : block(block), sums(sums) {
    const auto head_of = [&](const TokenTensor& tensor, int64_t head, const Sequence& sequence, int length) {
      return Head<Storage>{block.tokens_of<const Storage>(tensor, head, sequence), tensor.token, length};
    };
    q = head_of(call.q, block.head, queries_at, queries);
    grad_out = head_of(call.grad_out, block.head, queries_at, queries);
    k = head_of(call.k, block.key_head, block.of_keys, block.keys);
    v = head_of(call.v, block.key_head, block.of_keys, block.keys);
  }
};

constexpr int kSourceFloats = 64;  // that they take
static_assert(sizeof(Sources<float>) <= kSourceFloats * sizeof(float));

// Of a run of queries, with the sums of the keys before it, or of all.
template <typename Storage, bool kCausal>
__device__ __forceinline__ const Sources<Storage>& sources_of_queries(const MalaCall& call, int64_t place) {
  auto* from = static_cast<Sources<Storage>*>(dynamic_shared());
  if (threadIdx.x == 0) {
    const Block block(call, place, call.queries, call.heads);
    const int64_t line = block.index * call.key_heads + block.key_head;
    const int64_t state = kCausal ? line * tiles(call.queries, call.run) + block.run : line;
    new (from) Sources<Storage>(call, block, sums_at(call.sums, call, state), block.of_queries, block.queries);
  }
  __syncthreads();
  return *from;
}

// Numbers of a kind: how queries enter dS, dZ and dU.
__device__ __forceinline__ int64_t coefficient_count(const MalaCall& call) {
  return (call.q_bounds == nullptr ? call.sequences : 1) * call.heads * call.queries;
}

// How many keys a query sees.
__device__ __forceinline__ float keys_seen(const MalaCall& call, const Block& block, int query) {
  const int64_t count = call.causal ? call.seen + block.first + query + 1 : block.of_keys.length;
  return static_cast<float>(count > 0 ? count : 1);
}

// f(is causal) as a constant.
template <typename Function>
const char* with_causal(const MalaCall& call, Function f) {
  return call.causal ? f(std::true_type{}) : f(std::false_type{});
}

constexpr size_t shared_bytes(int tiles, int vectors) {
  return (kSourceFloats + static_cast<size_t>(tiles) * kTileFloats + static_cast<size_t>(vectors) * kTile) *
         sizeof(float);
}

}  // namespace tilewise
