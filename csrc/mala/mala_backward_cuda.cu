// The gradients of mala on CUDA: of queries by a chunk, which leaves three numbers a query, and then of keys and
// values.
#include "mala/mala_tiles.cuh"

namespace tilewise {
namespace {

// Shared memory of a block on every GPU from sm_80 on.
constexpr size_t kMinShared = 99 << 10;

__host__ __device__ __forceinline__ size_t query_gradient_bytes(int64_t tiles_of_w) {
  return (5 + static_cast<size_t>(tiles_of_w)) * kC * kD * sizeof(float) + 5 * kC * sizeof(float);
}

__host__ __device__ __forceinline__ bool keeps_w(const MalaCall& call) {
  return query_gradient_bytes((call.features + kD - 1) / kD) <= kMinShared;
}

// A block per chunk of queries of a head. W = dL/dphi, before what the magnitudes add, is kept for the second walk over
// the features where shared memory holds it, and formed again where it does not.
template <typename Storage>
__global__ void __launch_bounds__(kThreads, 2) mala_query_gradient_kernel(const __grid_constant__ MalaCall call) {
  float* f = static_cast<float*>(dynamic_shared());
  float* a = f + kC * kD;
  float* x = a + kC * kD;      // (32, 32) of grad_out, or of the keys
  float* y = x + kC * kD;      // (32, 32) of S, of v, or of the keys rotated
  float* pairs = y + kC * kD;  // (32, 32)
  float* rows = pairs + kC * kC;
  float *z = rows, *weight = rows + kC, *mean = rows + 2 * kC, *beta = rows + 3 * kC, *zeta = rows + 4 * kC;
  float* w = rows + 5 * kC;  // (features / 32, 32, 32) where they are kept, else (32, 32)
  const bool keeps = keeps_w(call);
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

  // A tile of W, phi of the queries in f, and causal that of the keys in x.
  const auto form_w = [&](int64_t feature, float* tile) {
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
    of_w.each([&](int i, int j, float sum) { tile[i * kD + j] = sum; });
    __syncthreads();
  };
  for (int64_t feature = 0; feature < call.features; feature += kD) {
    float* tile = keeps ? w + feature * kC : w;
    form_w(feature, tile);
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
    if (!keeps) form_w(feature, w);
    load_features(call, chunk.q, chunk.first, feature, f, a);
    if (call.causal) {
      load_features(call, chunk.k, chunk.first, feature, x, y);
      __syncthreads();
      accumulate_rows(x, kD, sums.z, feature, call.features, false);
    } else {
      for_tile(kC, kD, [&](int i, int j) { x[i * kD + j] = feature + j < call.features ? sums.z[feature + j] : 0.0f; });
    }
    __syncthreads();
    const float* tile = keeps ? w + feature * kC : w;
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

}  // namespace

const char* mala_query_gradient_cuda(const MalaCall& call, void* stream) {
  const int64_t blocks = call.sequences * call.heads * tiles(call.queries, kC);
  if (blocks == 0) return nullptr;
  return with_storage(call.dtype, [&](auto tag) {
    const size_t shared = query_gradient_bytes(keeps_w(call) ? tiles(call.features, kD) : 1);
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
