// mala on CUDA: a block of 256 threads per chunk of 32 tokens of a head, with float32 tiles in shared memory. The sums
// and the forward.
#include "mala/mala_tiles.cuh"

namespace tilewise {
namespace {

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

}  // namespace tilewise
