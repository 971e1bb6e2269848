// mala on CUDA, by chunks of 64 tokens of a head: the sums and the forward.
#include "mala/mala_tiles.cuh"

namespace tilewise {
namespace {

constexpr int kScanThreads = 256;

// S, Z and U of one share: a block per (line, share, 64 features, 64 values). Of whatever is stored, S is as of floats.
template <typename Storage>
__global__ void __launch_bounds__(kThreads, 2)
    mala_sums_kernel(const __grid_constant__ MalaCall call, const __grid_constant__ MalaShares shares) {
  float* a = static_cast<float*>(dynamic_shared());
  float* y = a + kTileFloats;
  const int64_t value_tiles = tiles(call.values), feature_tiles = tiles(call.features);
  const int value = static_cast<int>(flat_block() % value_tiles) * kTile;
  const int feature = static_cast<int>(flat_block() / value_tiles % feature_tiles) * kTile;
  const int64_t place = flat_block() / (value_tiles * feature_tiles);  // (line, share)
  const int64_t heads = shares.of_queries ? call.heads : call.key_heads;
  const int64_t index = place / shares.shares / heads, head = place / shares.shares % heads;
  if (index >= call.sequences) return;
  const int64_t* bounds = shares.of_queries ? call.q_bounds : call.k_bounds;
  const int64_t tokens = shares.of_queries ? call.queries : call.keys;
  const Sequence sequence = sequence_of(bounds, index, tokens);
  const int64_t batch = bounds == nullptr ? index : 0, begin = place % shares.shares * shares.share;
  const int64_t left = sequence.length - begin < shares.share ? sequence.length - begin : shares.share;
  const auto head_of = [&](const TokenTensor& tensor) {
    const Storage* data = static_cast<const Storage*>(tensor.data) + batch * tensor.batch + head * tensor.head;
    return Head<Storage>{data + (sequence.begin + begin) * tensor.token, tensor.token, 0};
  };
  auto of_features = head_of(shares.of_queries ? call.q : call.k);
  auto of_values = head_of(shares.of_queries ? call.grad_out : call.v);
  const int64_t all = (bounds == nullptr ? call.sequences : 1) * heads * tokens;
  const float* coefficients = call.coefficients + (batch * heads + head) * tokens + sequence.begin + begin;
  const Spot spot = staged_spot();
  Product s;
  float z[kColumns] = {}, u[kColumns] = {};
  for (int64_t first = 0; first < left; first += kTile) {
    of_features.length = of_values.length = static_cast<int>(left - first < kTile ? left - first : kTile);
    float c[kRows], x[kRows][kColumns];
    const auto load_coefficients = [&](int kind) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int token = spot.row + r * spot.apart;
        c[r] = !shares.of_queries ? 1.0f : token < of_values.length ? coefficients[kind * all + first + token] : 0.0f;
      }
    };
    const auto add_rows = [&](float(&sums)[kColumns]) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums[j] = fmaf(c[r], x[r][j], sums[j]);
      }
    };
    load_features(call, of_features, 0, feature, spot, x);
    load_coefficients(1);
    add_rows(z);
    load_coefficients(0);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) x[r][j] *= c[r];
    }
    __syncthreads();
    stage_spot(x, a);
    if (call.cos != nullptr) rotate_spot<false>(call, begin + first, of_features.length, 0, feature, false, spot, a);
    load_spot(of_values, 0, value, call.values, 0.0f, spot, x);
    load_coefficients(2);
    add_rows(u);
    stage_spot(x, y);
    __syncthreads();
    add_product(s, Columns<true>{a}, TokenColumns<Storage>{y}, of_values.length);
    of_features.rows += kTile * of_features.stride;
    of_values.rows += kTile * of_values.stride;
  }
  const MalaSums<float> out = sums_at(shares.parts, call, place);
  store_product(s, out.s + feature * call.values, call.values, static_cast<int>(call.features) - feature, value,
                call.values);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    a[spot.row * kTile + spot.column + j] = z[j];
    y[spot.row * kTile + spot.column + j] = u[j];
  }
  __syncthreads();
  const bool of_z = threadIdx.x / kTile == 0, of_u = threadIdx.x / kTile == 1;
  const int64_t column = threadIdx.x % kTile;
  float sum = 0.0f;
  for (int row = 0; row < spot.apart; ++row) sum += (of_z ? a : y)[row * kTile + column];
  if (of_z && value == 0 && feature + column < call.features) out.z[feature + column] = sum;
  if (of_u && feature == 0 && value + column < call.values) out.u[value + column] = sum;
}

__global__ void __launch_bounds__(kScanThreads) mala_scan_kernel(const __grid_constant__ MalaScan scan) {
  const int64_t i = flat_block() * kScanThreads + threadIdx.x;
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
__global__ void __launch_bounds__(kScanThreads) mala_group_sum_kernel(const __grid_constant__ MalaGroupSum sum) {
  const int64_t i = flat_block() * kScanThreads + threadIdx.x;
  if (i >= sum.outer * sum.inner) return;
  const float* parts = sum.parts + i / sum.inner * sum.group * sum.inner + i % sum.inner;
  float total = 0.0f;
  for (int64_t member = 0; member < sum.group; ++member) total += parts[member * sum.inner];
  from_float(total, static_cast<Storage*>(sum.out)[i]);
}

// A block per (run of queries of a head, 64 values). Causal, it takes S, Z and U along from chunk to chunk; within a
// chunk o = y + sum over j <= i of (weight (a_i . b_j) - mean) v_j.
template <typename Storage, bool kCausal>
__global__ void __launch_bounds__(kThreads, 2) mala_forward_kernel(const __grid_constant__ MalaCall call) {
  float* zs = static_cast<float*>(dynamic_shared()) + kSourceFloats;
  float *us = zs + kTile, *parts = us + kTile;  // of z: (3, 64)
  float *weight = parts + 3 * kTile, *mean = weight + kTile;
  float* a = mean + kTile;  // features of queries, then the weights of pairs
  float* s = a + kTileFloats;
  float* b = s + kTileFloats;  // causal: features of keys, and their values
  float* v = b + kTileFloats;
  const int64_t value_tiles = tiles(call.values);
  const int value = static_cast<int>(flat_block() % value_tiles) * kTile;
  const auto& from = sources_of_queries<Storage, kCausal>(call, flat_block() / value_tiles);
  const Block& block = from.block;
  if (block.queries == 0) return;
  const bool rotates = call.cos != nullptr;
  const Spot staged = staged_spot(), own = product_spot();
  const int diagonal = own.row - own.column;
  const auto sees = [&](int r, int c) { return c - r <= diagonal; };
  stage_vector(from.sums.u, value, call.values, us);
  for (int first = 0; first < block.queries; first += kTile) {
    const bool goes_on = first + kTile < block.queries;
    Product y, scores;
    float z[kRows] = {}, z_pairs[kRows] = {};
    __syncthreads();
    if (kCausal) stage_values(from.v, first, value, call.values, v);
    for (int feature = 0; feature == 0 || feature < call.features; feature += kTile) {
      const int depth = static_cast<int>(call.features) - feature;
      if (feature > 0) __syncthreads();
      if (call.features > kTile || first == 0) {
        stage_vector(from.sums.z, feature, call.features, zs);
        stage_sums<Storage>(call, from.sums.s, feature, value, s);
        __syncthreads();
      }
      float f[kRows][kColumns];
      load_features(call, from.q, first, feature, staged, f);
      add_dots(f, zs + staged.column, z);
      stage_operand<Storage>(f, a);
      if (!kCausal && rotates) rotate_features<Storage>(call, block.first, from.q.length, first, feature, a);
      if (kCausal) stage_features(call, from.k, first, feature, b);
      __syncthreads();
      if (kCausal && rotates) {
        add_row_sums(z_pairs, OtherRows<Storage>{a}, OtherRows<Storage>{b}, depth, sees);
        if (goes_on && threadIdx.x < kTile) add_columns(b, nullptr, threadIdx.x, zs);
        __syncthreads();
        rotate_features<Storage>(call, block.first, from.q.length, first, feature, a);
        rotate_features<Storage>(call, block.first, from.k.length, first, feature, b);
        __syncthreads();
      }
      add_product(y, OtherRows<Storage>{a}, OtherColumns<Storage>{s}, depth);
      if (kCausal) add_product(scores, OtherRows<Storage>{a}, OtherRows<Storage>{b}, depth);
    }
    if (kCausal && !rotates) scores.each([&](int r, int c, float& x) { z_pairs[r] += sees(r, c) ? x : 0.0f; });
    if (kCausal) store_row_sums(z_pairs, parts, false);
    store_dots(z, parts + 2 * kTile, false);
    __syncthreads();
    if (threadIdx.x < kTile) {
      const int i = static_cast<int>(threadIdx.x);
      const float count = keys_seen(call, block, first + i), share = call.scale / count;
      const float scaled = share * (parts[2 * kTile + i] + (kCausal ? parts[i] + parts[kTile + i] : 0.0f));
      weight[i] = share * (1.0f + 1.0f / (scaled + call.eps));
      mean[i] = scaled / count;
    }
    __syncthreads();
    y.each([&](int r, int c, float& x) { x = weight[own.row + r] * x - mean[own.row + r] * us[own.column + c]; });
    if (kCausal) {
      scores.each([&](int r, int c, float& x) {
        const float pair = weight[own.row + r] * x - mean[own.row + r];
        x = sees(r, c) ? operand<Storage>(pair) : 0.0f;
      });
      scores.store(a);
      if (goes_on) add_to_sums<Storage>(OtherColumns<Storage>{b}, TokenColumns<Storage>{v}, s);
      if (goes_on && !rotates && threadIdx.x < kTile) add_columns(b, nullptr, threadIdx.x, zs);
      __syncthreads();
      add_product(y, OtherRows<Storage>{a}, TokenColumns<Storage>{v}, kTile);
      if (goes_on && threadIdx.x / kTile == 1) add_columns(v, nullptr, threadIdx.x - kTile, us);
    }
    Storage* out = block.tokens_of<Storage>(call.out, block.head, block.of_queries);
    store_product(y, out + first * call.out.token, call.out.token, block.queries - first, value, call.values);
  }
}

}  // namespace

const char* mala_sums_cuda(const MalaCall& call, const MalaShares& shares, void* stream) {
  const int64_t heads = shares.of_queries ? call.heads : call.key_heads;
  const int64_t blocks = call.sequences * heads * shares.shares * tiles(call.values) * tiles(call.features);
  if (blocks == 0) return nullptr;
  return with_storage(call.dtype, [&](auto tag) {
    return launch(mala_sums_kernel<decltype(tag)>, flat_grid(blocks), dim3(kThreads), shared_bytes(2, 0), stream, call,
                  shares);
  });
}

const char* mala_scan_cuda(const MalaScan& scan, void* stream) {
  if (scan.lines * scan.width == 0) return nullptr;
  return launch(mala_scan_kernel, flat_grid(tiles(scan.lines * scan.width, kScanThreads)), dim3(kScanThreads), 0,
                stream, scan);
}

const char* mala_group_sum_cuda(const MalaGroupSum& sum, void* stream) {
  if (sum.outer * sum.inner == 0) return nullptr;
  return with_storage(sum.dtype, [&](auto tag) {
    return launch(mala_group_sum_kernel<decltype(tag)>, flat_grid(tiles(sum.outer * sum.inner, kScanThreads)),
                  dim3(kScanThreads), 0, stream, sum);
  });
}

const char* mala_forward_cuda(const MalaCall& call, void* stream) {
  const int64_t blocks = call.sequences * call.heads * tiles(call.queries, call.run) * tiles(call.values);
  if (blocks == 0) return nullptr;
  return with_storage(call.dtype, [&](auto tag) {
    using Storage = decltype(tag);
    return with_causal(call, [&](auto causal) {
      return launch(mala_forward_kernel<Storage, causal.value>, flat_grid(blocks), dim3(kThreads),
                    shared_bytes(causal.value ? 4 : 2, 7), stream, call);
    });
  });
}

}  // namespace tilewise
