// mala on CUDA: a block of 256 threads per chunk of 32 tokens of a head, with float32 tiles in shared memory.
#include "mala/mala.h"

#include "common/launch.cuh"
#include "common/vexp.h"
#include "rows/rows.cuh"

namespace tilewise {
namespace {

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

// S, Z and U of one share: a block per (line, share, 32 features, 64 values).
template <typename Storage>
__global__ void __launch_bounds__(kThreads)
    mala_sums_kernel(const __grid_constant__ MalaCall call, const __grid_constant__ MalaShares shares) {
  constexpr int kV = 64;
  float* f = static_cast<float*>(dynamic_shared());
  float* a = f + kC * kD;
  float* y = a + kC * kD;
  float* c = y + kC * kV;  // (3, 32)
  const int64_t value_tiles = (call.values + kV - 1) / kV;
  const int64_t feature_tiles = (call.features + kD - 1) / kD;
  const int64_t block = flat_block();
  const int64_t value = block % value_tiles * kV;
  const int64_t feature = block / value_tiles % feature_tiles * kD;
  const int64_t place = block / (value_tiles * feature_tiles);  // (line, share)
  const int64_t heads = shares.of_queries ? call.heads : call.key_heads;
  const int64_t line = place / shares.shares;
  if (line >= call.sequences * heads) return;
  const int64_t index = line / heads, head = line % heads;
  const int64_t* bounds = shares.of_queries ? call.q_bounds : call.k_bounds;
  const int64_t tokens = shares.of_queries ? call.queries : call.keys;
  const Sequence sequence = sequence_of(bounds, index, tokens);
  const int64_t begin = place % shares.shares * shares.share;
  Tile<kV> s;
  float z = 0.0f, u = 0.0f;
  for (int64_t first = begin; first < begin + shares.share && first < sequence.length; first += kC) {
    const auto x_head = head_of<Storage>(shares.of_queries ? call.q : call.k, bounds, index, head, sequence, first);
    const auto y_head =
        head_of<Storage>(shares.of_queries ? call.grad_out : call.v, bounds, index, head, sequence, first);
    load_features(call, x_head, first, feature, f, a);
    load_values(y_head, value, call.values, kV, y);
    if (threadIdx.x < 3 * kC) {
      const int i = threadIdx.x % kC;
      const int64_t batch = bounds == nullptr ? index : 0;
      const int64_t at = (batch * heads + head) * tokens + sequence.begin + first + i;
      const int64_t all = (bounds == nullptr ? call.sequences : 1) * heads * tokens;
      c[threadIdx.x] = !shares.of_queries            ? 1.0f
                       : i < sequence.length - first ? call.coefficients[threadIdx.x / kC * all + at]
                                                     : 0.0f;
    }
    __syncthreads();
    float* rotated = call.cos != nullptr ? a : f;
    if (threadIdx.x < kD) {
      for (int i = 0; i < kC; ++i) z += c[kC + i] * f[i * kD + threadIdx.x];
    }
    if (threadIdx.x < kV) {
      for (int i = 0; i < kC; ++i) u += c[2 * kC + i] * y[i * kV + threadIdx.x];
    }
    __syncthreads();
    for_tile(kC, kD, [&](int i, int j) { rotated[i * kD + j] *= c[i]; });
    __syncthreads();
    s.add(rotated, 1, kD, y, kV, 1, kC);
    __syncthreads();
  }
  const MalaSums<float> out = sums_at(shares.parts, call, place);
  s.each([&](int i, int j, float sum) {
    if (feature + i < call.features && value + j < call.values) out.s[(feature + i) * call.values + value + j] = sum;
  });
  if (value == 0 && threadIdx.x < kD && feature + threadIdx.x < call.features) out.z[feature + threadIdx.x] = z;
  if (feature == 0 && threadIdx.x < kV && value + threadIdx.x < call.values) out.u[value + threadIdx.x] = u;
}

__global__ void __launch_bounds__(kThreads) mala_scan_kernel(const __grid_constant__ MalaScan scan) {
  const int64_t i = flat_block() * kThreads + threadIdx.x;
  if (i >= scan.lines * scan.width) return;
  const int64_t line = i / scan.width, column = i % scan.width;
  float sum = scan.start != nullptr ? scan.start[i] : 0.0f;
  for (int64_t step = 0; step < scan.count; ++step) {
    float* part = scan.parts + (line * scan.count + (scan.back ? scan.count - 1 - step : step)) * scan.width + column;
    const float own = *part;
    if (!scan.total_only) *part = sum;
    sum += own;
  }
  if (scan.total != nullptr) scan.total[i] = sum;
}

template <typename Storage>
__global__ void __launch_bounds__(kThreads) mala_group_sum_kernel(const __grid_constant__ MalaGroupSum sum) {
  const int64_t i = flat_block() * kThreads + threadIdx.x;
  if (i >= sum.outer * sum.inner) return;
  const float* parts = sum.parts + i / sum.inner * sum.group * sum.inner + i % sum.inner;
  float total = 0.0f;
  for (int64_t member = 0; member < sum.group; ++member) total += parts[member * sum.inner];
  from_float(total, static_cast<Storage*>(sum.out)[i]);
}

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
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane == 0) out[row] += sum;
}

// A block per (chunk of queries of a head, 64 values).
template <typename Storage>
__global__ void __launch_bounds__(kThreads) mala_forward_kernel(const __grid_constant__ MalaCall call) {
  constexpr int kV = 64;
  float* f = static_cast<float*>(dynamic_shared());
  float* a = f + kC * kD;
  float* g = a + kC * kD;
  float* b = g + kC * kD;
  float* s = b + kC * kD;      // (32, 64): S, then values
  float* pairs = s + kD * kV;  // (32, 32)
  float* z = pairs + kC * kC;  // (32,)
  const int64_t value_tiles = (call.values + kV - 1) / kV;
  const int64_t value = flat_block() % value_tiles * kV;
  const int64_t place = flat_block() / value_tiles;
  if (place >= call.sequences * call.heads * chunks_of(call.queries)) return;
  const QueryChunk<Storage> chunk(call, place);
  if (chunk.empty()) return;
  const MalaSums<float> sums = sums_at(call.sums, call, chunk.line);
  const bool rotates = call.cos != nullptr;
  Tile<kV> y;
  Tile<kC> scores;
  if (threadIdx.x < kC) z[threadIdx.x] = 0.0f;
  for (int64_t feature = 0; feature < call.features; feature += kD) {
    __syncthreads();
    load_features(call, chunk.q, chunk.first, feature, f, a);
    if (call.causal) load_features(call, chunk.k, chunk.first, feature, g, b);
    load_sums(sums.s, call, feature, value, kV, s);
    __syncthreads();
    y.add(rotates ? a : f, kD, 1, s, kV, 1, kD);
    if (call.causal) scores.add(rotates ? a : f, kD, 1, rotates ? b : g, 1, kD, kD);
    __syncthreads();
    if (call.causal) {
      accumulate_rows(g, kD, sums.z, feature, call.features, false);
    } else {
      for_tile(kC, kD, [&](int i, int j) { g[i * kD + j] = feature + j < call.features ? sums.z[feature + j] : 0.0f; });
    }
    __syncthreads();
    add_row_dots(f, g, kD, z);
  }
  __syncthreads();
  if (call.causal) {
    scores.each([&](int i, int j, float score) { pairs[i * kC + j] = j <= i ? score : 0.0f; });
    load_values(chunk.v, value, call.values, kV, s);
    __syncthreads();
    y.add(pairs, kC, 1, s, kV, 1, kC);
    __syncthreads();
    accumulate_rows(s, kV, sums.u, value, call.values, false);
  } else {
    for_tile(kC, kV, [&](int i, int j) { s[i * kV + j] = value + j < call.values ? sums.u[value + j] : 0.0f; });
  }
  __syncthreads();
  const int64_t batch = call.q_bounds == nullptr ? chunk.index : 0;
  Storage* out = static_cast<Storage*>(call.out.data) + batch * call.out.batch + chunk.head * call.out.head +
                 (chunk.queries.begin + chunk.first) * call.out.token;
  y.each([&](int i, int j, float sum) {
    if (i >= chunk.q.left || value + j >= call.values) return;
    const float count = chunk.seen(call, i);
    const float share = call.scale / count;
    const float scaled = share * z[i];
    from_float((1.0f + 1.0f / (scaled + call.eps)) * share * sum - scaled / count * s[i * kV + j],
               out[i * call.out.token + value + j]);
  });
}

// A block per chunk of queries of a head.
template <typename Storage>
__global__ void __launch_bounds__(kThreads, 2) mala_query_gradient_kernel(const __grid_constant__ MalaCall call) {
  float* f = static_cast<float*>(dynamic_shared());
  float* a = f + kC * kD;
  float* x = a + kC * kD;      // (32, 32) of grad_out, or of the keys
  float* y = x + kC * kD;      // (32, 32) of S, of v, or of the keys rotated
  float* pairs = y + kC * kD;  // (32, 32)
  float* rows = pairs + kC * kC;
  float *z = rows, *weight = rows + kC, *mean = rows + 2 * kC, *beta = rows + 3 * kC, *zeta = rows + 4 * kC;
  float* w = rows + 5 * kC;  // (features / 32, 32, 32)
  const int64_t place = flat_block();
  if (place >= call.sequences * call.heads * chunks_of(call.queries)) return;
  const QueryChunk<Storage> chunk(call, place);
  if (chunk.empty()) return;
  const MalaSums<float> sums = sums_at(call.sums, call, chunk.line);
  const bool rotates = call.cos != nullptr;
  if (threadIdx.x < kC) z[threadIdx.x] = weight[threadIdx.x] = mean[threadIdx.x] = 0.0f;

  Tile<kC> seen;  // do . v
  for (int64_t value = 0; value < call.values; value += kD) {
    __syncthreads();
    load_values(chunk.grad_out, value, call.values, kD, x);
    if (call.causal) load_values(chunk.v, value, call.values, kD, y);
    __syncthreads();
    if (call.causal) seen.add(x, kD, 1, y, 1, kD, kD);
    __syncthreads();
    if (call.causal) {
      accumulate_rows(y, kD, sums.u, value, call.values, false);
    } else {
      for_tile(kC, kD, [&](int i, int j) { y[i * kD + j] = value + j < call.values ? sums.u[value + j] : 0.0f; });
    }
    __syncthreads();
    add_row_dots(x, y, kD, mean);
  }
  __syncthreads();
  seen.each([&](int i, int j, float pair) { pairs[i * kC + j] = j <= i ? pair : 0.0f; });

  for (int64_t feature = 0; feature < call.features; feature += kD) {
    Tile<kD> of_w;
    for (int64_t value = 0; value < call.values; value += kD) {
      __syncthreads();
      load_values(chunk.grad_out, value, call.values, kD, x);
      load_sums(sums.s, call, feature, value, kD, y);
      __syncthreads();
      of_w.add(x, kD, 1, y, 1, kD, kD);
    }
    __syncthreads();
    load_features(call, chunk.q, chunk.first, feature, f, a);
    if (call.causal) load_features(call, chunk.k, chunk.first, feature, x, y);
    __syncthreads();
    if (call.causal) of_w.add(pairs, kC, 1, rotates ? y : x, kD, 1, kC);
    float* tile = w + feature * kC;
    of_w.each([&](int i, int j, float sum) { tile[i * kD + j] = sum; });
    __syncthreads();
    if (call.causal) {
      accumulate_rows(x, kD, sums.z, feature, call.features, false);
    } else {
      for_tile(kC, kD, [&](int i, int j) { x[i * kD + j] = feature + j < call.features ? sums.z[feature + j] : 0.0f; });
    }
    __syncthreads();
    add_row_dots(f, x, kD, z);
    add_row_dots(rotates ? a : f, tile, kD, weight);
  }
  __syncthreads();
  const int64_t batch = call.q_bounds == nullptr ? chunk.index : 0;
  if (threadIdx.x < kC) {
    const int i = threadIdx.x;
    const float count = chunk.seen(call, i);
    const float share = call.scale / count;
    const float scaled = share * z[i];
    const float inverse = 1.0f / (scaled + call.eps);
    beta[i] = share * (1.0f + inverse);
    zeta[i] = share * (-share * weight[i] * inverse * inverse - mean[i] / count);
    if (i < chunk.q.left) {
      const int64_t all = (call.q_bounds == nullptr ? call.sequences : 1) * call.heads * call.queries;
      float* at =
          call.coefficients + (batch * call.heads + chunk.head) * call.queries + chunk.queries.begin + chunk.first + i;
      at[0] = beta[i];
      at[all] = zeta[i];
      at[2 * all] = -scaled / count;
    }
  }
  Storage* out = static_cast<Storage*>(call.grad_q.data) + batch * call.grad_q.batch + chunk.head * call.grad_q.head +
                 (chunk.queries.begin + chunk.first) * call.grad_q.token;
  for (int64_t feature = 0; feature < call.features; feature += kD) {
    __syncthreads();
    load_features(call, chunk.q, chunk.first, feature, f, a);
    if (call.causal) {
      load_features(call, chunk.k, chunk.first, feature, x, y);
      __syncthreads();
      accumulate_rows(x, kD, sums.z, feature, call.features, false);
    } else {
      for_tile(kC, kD, [&](int i, int j) { x[i * kD + j] = feature + j < call.features ? sums.z[feature + j] : 0.0f; });
    }
    __syncthreads();
    const float* tile = w + feature * kC;
    for_tile(kC, kD, [&](int i, int j) {
      const int64_t d = feature + j;
      if (i >= chunk.q.left || d >= call.features) return;
      float back = tile[i * kD + j];
      if (rotates) {
        const int64_t angle = (chunk.first + i) * (call.features / 2) + d / 2;
        const float other = tile[i * kD + (j ^ 1)];
        back = call.cos[angle] * back + (d % 2 == 0 ? call.sin[angle] : -call.sin[angle]) * other;
      }
      const float df = zeta[i] * x[i * kD + j] + beta[i] * back;
      const float feature_value = f[i * kD + j];
      from_float(feature_value < 1.0f ? df * feature_value : df, out[i * call.grad_q.token + d]);
    });
  }
}

// A block per chunk of keys: of a key head, or causal of a query head and its keys.
template <typename Storage, typename Gradient>
__global__ void __launch_bounds__(kThreads, 2) mala_key_gradient_kernel(const __grid_constant__ MalaCall call) {
  float* f = static_cast<float*>(dynamic_shared());
  float* a = f + kC * kD;
  float* g = a + kC * kD;
  float* b = g + kC * kD;
  float* x = b + kC * kD;
  float* y = x + kC * kD;
  float* of_values = y + kC * kD;            // (32, 32) v . do of the queries that see a key
  float* of_features = of_values + kC * kC;  // (32, 32) b . a
  float* c = of_features + kC * kC;          // (3, 32)
  const int64_t chunks = chunks_of(call.keys);
  const int64_t heads = call.causal ? call.heads : call.key_heads;
  const int64_t place = flat_block();
  if (place >= call.sequences * heads * chunks) return;
  const int64_t first = place % chunks * kC;
  const int64_t index = place / chunks / heads, head = place / chunks % heads;
  const int64_t key_head = head / (heads / call.key_heads);
  const Sequence keys = sequence_of(call.k_bounds, index, call.keys);
  if (first >= keys.length) return;
  const auto k = head_of<Storage>(call.k, call.k_bounds, index, key_head, keys, first);
  const auto v = head_of<Storage>(call.v, call.k_bounds, index, key_head, keys, first);
  const auto q = head_of<Storage>(call.q, call.k_bounds, index, head, keys, first);
  const auto grad = head_of<Storage>(call.grad_out, call.k_bounds, index, head, keys, first);
  const MalaSums<float> sums = sums_at(call.grad_sums, call, call.causal ? place : index * call.key_heads + key_head);
  const bool rotates = call.cos != nullptr;
  const int64_t batch = call.k_bounds == nullptr ? index : 0;
  if (call.causal) {
    if (threadIdx.x < 3 * kC) {
      const int i = threadIdx.x % kC;
      const int64_t all = (call.k_bounds == nullptr ? call.sequences : 1) * call.heads * call.queries;
      const int64_t at = (batch * call.heads + head) * call.queries + keys.begin + first + i;
      c[threadIdx.x] = i < k.left ? call.coefficients[threadIdx.x / kC * all + at] : 0.0f;
    }
    Tile<kC> values_pairs, feature_pairs;
    for (int64_t value = 0; value < call.values; value += kD) {
      __syncthreads();
      load_values(v, value, call.values, kD, x);
      load_values(grad, value, call.values, kD, y);
      __syncthreads();
      values_pairs.add(x, kD, 1, y, 1, kD, kD);
    }
    for (int64_t feature = 0; feature < call.features; feature += kD) {
      __syncthreads();
      load_features(call, q, first, feature, f, a);
      load_features(call, k, first, feature, g, b);
      __syncthreads();
      feature_pairs.add(rotates ? b : g, kD, 1, rotates ? a : f, 1, kD, kD);
    }
    __syncthreads();
    values_pairs.each([&](int i, int j, float pair) { of_values[i * kC + j] = j >= i ? pair * c[j] : 0.0f; });
    feature_pairs.each([&](int i, int j, float pair) { of_features[i * kC + j] = j >= i ? pair * c[j] : 0.0f; });
  }

  Gradient* grad_k = static_cast<Gradient*>(call.grad_k.data) + batch * call.grad_k.batch + head * call.grad_k.head +
                     (keys.begin + first) * call.grad_k.token;
  for (int64_t feature = 0; feature < call.features; feature += kD) {
    Tile<kD> of_w;  // dS v
    for (int64_t value = 0; value < call.values; value += kD) {
      __syncthreads();
      load_values(v, value, call.values, kD, x);
      load_sums(sums.s, call, feature, value, kD, y);
      __syncthreads();
      of_w.add(x, kD, 1, y, 1, kD, kD);
    }
    __syncthreads();
    load_features(call, k, first, feature, g, b);
    if (call.causal) load_features(call, q, first, feature, f, a);
    __syncthreads();
    if (call.causal) of_w.add(of_values, kC, 1, rotates ? a : f, kD, 1, kC);
    of_w.each([&](int i, int j, float sum) { x[i * kD + j] = sum; });
    __syncthreads();
    if (call.causal) {
      for_tile(kC, kD, [&](int i, int j) { y[i * kD + j] = c[kC + i] * f[i * kD + j]; });
      __syncthreads();
      accumulate_rows(y, kD, sums.z, feature, call.features, true);
    } else {
      for_tile(kC, kD, [&](int i, int j) { y[i * kD + j] = feature + j < call.features ? sums.z[feature + j] : 0.0f; });
    }
    __syncthreads();
    for_tile(kC, kD, [&](int i, int j) {
      const int64_t d = feature + j;
      if (i >= k.left || d >= call.features) return;
      float back = x[i * kD + j];
      if (rotates) {
        const int64_t angle = (first + i) * (call.features / 2) + d / 2;
        back = call.cos[angle] * back + (d % 2 == 0 ? call.sin[angle] : -call.sin[angle]) * x[i * kD + (j ^ 1)];
      }
      const float dg = y[i * kD + j] + back;
      const float key = g[i * kD + j];
      from_float(key < 1.0f ? dg * key : dg, grad_k[i * call.grad_k.token + d]);
    });
  }

  Gradient* grad_v = static_cast<Gradient*>(call.grad_v.data) + batch * call.grad_v.batch + head * call.grad_v.head +
                     (keys.begin + first) * call.grad_v.token;
  for (int64_t value = 0; value < call.values; value += kD) {
    Tile<kD> of_v;  // dS^T b
    for (int64_t feature = 0; feature < call.features; feature += kD) {
      __syncthreads();
      load_features(call, k, first, feature, g, b);
      load_sums(sums.s, call, feature, value, kD, y);
      __syncthreads();
      of_v.add(rotates ? b : g, kD, 1, y, kD, 1, kD);
    }
    __syncthreads();
    if (call.causal) load_values(grad, value, call.values, kD, x);
    __syncthreads();
    if (call.causal) {
      of_v.add(of_features, kC, 1, x, kD, 1, kC);
      for_tile(kC, kD, [&](int i, int j) { y[i * kD + j] = c[2 * kC + i] * x[i * kD + j]; });
      __syncthreads();
      accumulate_rows(y, kD, sums.u, value, call.values, true);
    } else {
      for_tile(kC, kD, [&](int i, int j) { y[i * kD + j] = value + j < call.values ? sums.u[value + j] : 0.0f; });
    }
    __syncthreads();
    of_v.each([&](int i, int j, float sum) {
      if (i < k.left && value + j < call.values)
        from_float(sum + y[i * kD + j], grad_v[i * call.grad_v.token + value + j]);
    });
  }
}

int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

constexpr size_t kTileBytes = kC * kD * sizeof(float);

}  // namespace

const char* mala_sums_cuda(const MalaCall& call, const MalaShares& shares, void* stream) {
  const int64_t heads = shares.of_queries ? call.heads : call.key_heads;
  const int64_t blocks = call.sequences * heads * shares.shares * tiles(call.values, 64) * tiles(call.features, kD);
  if (blocks == 0) return nullptr;
  return with_storage(call.dtype, [&](auto tag) {
    return launch(mala_sums_kernel<decltype(tag)>, flat_grid(blocks), dim3(kThreads),
                  4 * kTileBytes + 3 * kC * sizeof(float), stream, call, shares);
  });
}

const char* mala_scan_cuda(const MalaScan& scan, void* stream) {
  if (scan.lines * scan.width == 0) return nullptr;
  return launch(mala_scan_kernel, flat_grid(tiles(scan.lines * scan.width, kThreads)), dim3(kThreads), 0, stream, scan);
}

const char* mala_group_sum_cuda(const MalaGroupSum& sum, void* stream) {
  if (sum.outer * sum.inner == 0) return nullptr;
  return with_storage(sum.dtype, [&](auto tag) {
    return launch(mala_group_sum_kernel<decltype(tag)>, flat_grid(tiles(sum.outer * sum.inner, kThreads)),
                  dim3(kThreads), 0, stream, sum);
  });
}

const char* mala_forward_cuda(const MalaCall& call, void* stream) {
  const int64_t blocks = call.sequences * call.heads * tiles(call.queries, kC) * tiles(call.values, 64);
  if (blocks == 0) return nullptr;
  return with_storage(call.dtype, [&](auto tag) {
    return launch(mala_forward_kernel<decltype(tag)>, flat_grid(blocks), dim3(kThreads),
                  7 * kTileBytes + kC * sizeof(float), stream, call);
  });
}

const char* mala_query_gradient_cuda(const MalaCall& call, void* stream) {
  const int64_t blocks = call.sequences * call.heads * tiles(call.queries, kC);
  if (blocks == 0) return nullptr;
  return with_storage(call.dtype, [&](auto tag) {
    const size_t shared = (5 + static_cast<size_t>(tiles(call.features, kD))) * kTileBytes + 5 * kC * sizeof(float);
    return launch(mala_query_gradient_kernel<decltype(tag)>, flat_grid(blocks), dim3(kThreads), shared, stream, call);
  });
}

const char* mala_key_gradient_cuda(const MalaCall& call, void* stream) {
  const int64_t heads = call.causal ? call.heads : call.key_heads;
  const int64_t blocks = call.sequences * heads * tiles(call.keys, kC);
  if (blocks == 0) return nullptr;
  const size_t shared = 8 * kTileBytes + 3 * kC * sizeof(float);
  return with_storage(call.dtype, [&](auto tag) {
    using Storage = decltype(tag);
    if (call.grad_dtype == call.dtype)
      return launch(mala_key_gradient_kernel<Storage, Storage>, flat_grid(blocks), dim3(kThreads), shared, stream,
                    call);
    return launch(mala_key_gradient_kernel<Storage, float>, flat_grid(blocks), dim3(kThreads), shared, stream, call);
  });
}

}  // namespace tilewise
