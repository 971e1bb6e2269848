// The statistics pass: one group of threads per row, a warp or a block. Each thread streams its share of the row
// through registers into a pass object (PlainSoftmax, FullSoftmax or RowMoments); the objects are merged in a fixed
// order.
#pragma once

#include "rows/access.cuh"

namespace tilewise {

// Leaves in x what joins a sum that holds its largest term back: of each element and the maximum so far, the smaller.
template <int kCount>
__device__ __forceinline__ float hold_back_max(float (&x)[kCount], float max) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float smaller = x[i] > max ? max : x[i];  // NaN joins
    max = fmaxf(max, x[i]);
    x[i] = smaller;
  }
  return max;
}

// max and sum, nothing else.
struct PlainSoftmax : NoSide {
  using Stats = SoftmaxStats<float>;
  static constexpr int kBatch = 4;
  static constexpr int kBlocks = 4;
  // The reference follows the maximum only when it lags by more than this: rescaling is then rare.
  static constexpr float kSlack = 4.0f;

  float max = -infinity<float>();
  float ceiling = -infinity<float>();
  float reference = 0.0f;
  float sum = 0.0f;

  template <typename Op>
  __device__ PlainSoftmax(const Op&, int64_t, int64_t) {}

  template <int kCount>
  __device__ __forceinline__ void add(float (&x)[kCount], Side<kCount>, int64_t) {
    max = hold_back_max(x, max);
    if (max > ceiling) {
      const float next = max * kLog2E;
      sum = sum == 0.0f ? 0.0f : sum * fast_exp2(reference - next);
      reference = next;
      ceiling = max + kSlack;
    }
    float part = fast_exp2(fmaf(x[0], kLog2E, -reference));
#pragma unroll
    for (int i = 1; i < kCount; ++i) part += fast_exp2(fmaf(x[i], kLog2E, -reference));
    sum += part;
  }

  __device__ Stats finish() const {
    Stats stats;
    stats.max = max;
    stats.sum = sum == 0.0f ? 0.0f : sum * correction(max, reference);
    return stats;
  }

  static __device__ __forceinline__ Stats merge_lanes(Stats stats) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      Stats other;
      other.max = __shfl_xor_sync(0xffffffffu, stats.max, offset);
      other.sum = __shfl_xor_sync(0xffffffffu, stats.sum, offset);
      merge(stats, other);
    }
    return stats;
  }
};

// Everything of a SoftmaxRequest. Options are tested once per vector, not per element.
template <typename Probability>
struct FullSoftmax {
  using Stats = SoftmaxStats<float>;
  using Dense = DenseRow<Probability>;
  static constexpr int kBatch = Dense::kProbabilities ? 2 : 4;
  static constexpr int kBlocks = Dense::kProbabilities ? 2 : 3;
  template <int kCount>
  using Side = Run<typename Dense::Stored, kCount>;

  Transform<float> transform;
  bool plain;
  bool details;
  Dense dense;
  Stats stats;

  template <typename Op>
  __device__ FullSoftmax(const Op& op, int64_t row, int64_t first_run)
      : transform(op.request.transform),
        plain(is_identity(transform)),
        details(op.request.details),
        dense(op.request.dense, row, first_run) {}

  template <int kCount>
  __device__ __forceinline__ Side<kCount> fetch(int64_t column) const {
    return dense.template fetch<kCount>(column);
  }

  template <int kCount>
  __device__ __forceinline__ void add(float (&x)[kCount], const Side<kCount>& side, int64_t column) {
    if (!plain) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = apply(transform, x[i]);
    }
    float joining[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) joining[i] = x[i];
    const float top = hold_back_max(joining, stats.max);
    if (details && (top > stats.max || (top == stats.max && column < stats.argmax))) {
#pragma unroll
      for (int i = kCount - 1; i >= 0; --i) stats.argmax = x[i] == top ? column + i : stats.argmax;
    }
    if (top > stats.max) rebase(stats, top);
    // While only -inf was seen, x - base is -inf, not NaN.
    const float base = stats.max > -infinity<float>() ? stats.max : 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float e = fast_exp(joining[i] - base);
      stats.sum += e;
      if (details) stats.exp_dot += e * fmaxf(joining[i] - base, ExpFloor<float>::value);
    }
    if (dense.active) {
      float c[kCount];
      dense.coefficients(side, column, c);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        stats.weight_sum += c[i];
        stats.weighted_dot += c[i] != 0.0f ? c[i] * (x[i] - base) : 0.0f;
      }
    }
  }

  __device__ Stats finish() const { return stats; }

  static __device__ __forceinline__ Stats merge_lanes(Stats stats) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      Stats other;
      other.max = __shfl_xor_sync(0xffffffffu, stats.max, offset);
      other.sum = __shfl_xor_sync(0xffffffffu, stats.sum, offset);
      other.weight_sum = __shfl_xor_sync(0xffffffffu, stats.weight_sum, offset);
      other.weighted_dot = __shfl_xor_sync(0xffffffffu, stats.weighted_dot, offset);
      other.exp_dot = __shfl_xor_sync(0xffffffffu, stats.exp_dot, offset);
      other.argmax = __shfl_xor_sync(0xffffffffu, static_cast<long long>(stats.argmax), offset);
      merge(stats, other);
    }
    return stats;
  }
};

// Mean and M2. With n values seen, a run of k and deviations d from the mean so far:
//   mean' = mean + sum d / (n + k),   M2' = M2 + sum d^2 - (sum d)^2 / (n + k)
// The subtraction never cancels: the first value starts the mean, and later n + k > k. A run whose squares are too
// large makes the thread go on in smaller units.
struct RowMoments : NoSide {
  using Stats = MomentStats<float>;
  static constexpr int kBatch = 4;
  static constexpr int kBlocks = 4;

  Stats stats;

  template <typename Op>
  __device__ RowMoments(const Op&, int64_t, int64_t) {}

  template <int kCount>
  __device__ __forceinline__ void add(const float (&x)[kCount], Side<kCount>, int64_t) {
    if (stats.count == 0.0f) stats.mean = x[0] * stats.scale;
    float sum, square;
    measure(x, sum, square);
    constexpr float kMost = MomentRange<float>::most;
    if (!(square < kMost * kMost)) {
      shrink(stats);
      measure(x, sum, square);
    }
    stats.count += kCount;
    const float step = fast_divide(sum, stats.count);
    stats.mean += step;
    stats.m2 += fmaf(-sum, step, square);
  }

  template <int kCount>
  __device__ __forceinline__ void measure(const float (&x)[kCount], float& sum, float& square) const {
    sum = square = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float d = fmaf(x[i], stats.scale, -stats.mean);
      sum += d;
      square = fmaf(d, d, square);
    }
  }

  __device__ Stats finish() const { return stats; }

  // The result is lane 0's.
  static __device__ __forceinline__ Stats merge_lanes(Stats stats) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      Stats other;
      other.count = __shfl_down_sync(0xffffffffu, stats.count, offset);
      other.mean = __shfl_down_sync(0xffffffffu, stats.mean, offset);
      other.m2 = __shfl_down_sync(0xffffffffu, stats.m2, offset);
      other.scale = __shfl_down_sync(0xffffffffu, stats.scale, offset);
      merge(stats, other);
    }
    return stats;
  }
};

// The result is thread 0's of the row.
template <typename Pass>
__device__ __forceinline__ typename Pass::Stats merge_over_row(typename Pass::Stats stats) {
  using Stats = typename Pass::Stats;
  stats = Pass::merge_lanes(stats);
  if (blockDim.x == kWarp) return stats;
  Stats* partial = static_cast<Stats*>(dynamic_shared());
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = stats;
  __syncthreads();
  if (threadIdx.x >= kWarp) return stats;
  return Pass::merge_lanes(threadIdx.x < blockDim.x / kWarp ? partial[threadIdx.x] : Stats{});
}

// Block (threads of a row or a part of one, rows): several rows only where a row is one warp. A warp takes kBatch
// consecutive groups of 32 vectors at a time, all loaded before the first is used; parts take turns.
template <typename Storage, typename Pass, typename Op>
__global__ void __launch_bounds__(kMostThreads, Pass::kBlocks) row_statistics_kernel(const __grid_constant__ Op op) {
  constexpr int kRun = kVector<Storage>;
  constexpr int kHop = kWarp * kRun;
  constexpr int kChunk = Pass::kBatch * kHop;
  const int64_t unit = flat_block() * blockDim.y + threadIdx.y, parts = op.parts.count;
  const int64_t row = parts == 1 ? unit : unit / parts;
  const int part = static_cast<int>(unit - row * parts);
  if (row >= op.logits.rows || skip_row(op, row, part == 0 && threadIdx.x == 0)) return;  // all of the row alike
  const RowCut cut = RowCut::of<Storage>(op.logits, row);
  const RowReader<Storage> logits(op.logits, row, cut.head);
  Pass pass(op, row, cut.head);

  for (int64_t i = part * blockDim.x + threadIdx.x; i < cut.scalars; i += parts * blockDim.x) {
    const int64_t column = cut.scalar_column(i);
    float x[1];
    widen(logits.template read<false, 1>(column), x);
    pass.template add<1>(x, pass.template fetch<1>(column), column);
  }

  const auto add_chunk = [&](auto whole, int64_t first) {
    constexpr bool kWhole = decltype(whole)::value;
    Run<Storage, kRun> runs[Pass::kBatch];
    typename Pass::template Side<kRun> sides[Pass::kBatch];
#pragma unroll
    for (int u = 0; u < Pass::kBatch; ++u) {
      if (!kWhole && first + u * kHop >= cut.body_end) break;
      runs[u] = load_vectors<false, kRun>(logits.data + first + u * kHop);
      sides[u] = pass.template fetch<kRun>(first + u * kHop);
    }
#pragma unroll
    for (int u = 0; u < Pass::kBatch; ++u) {
      if (!kWhole && first + u * kHop >= cut.body_end) break;
      float x[kRun];
      widen(runs[u], x);
      pass.template add<kRun>(x, sides[u], first + u * kHop);
    }
  };
  const int lane_offset = threadIdx.x % kWarp * kRun;
  const int warps = blockDim.x / kWarp;
  const int64_t stride = parts * warps * kChunk;
  int64_t chunk = cut.head + (part * warps + threadIdx.x / kWarp) * kChunk;
  for (; chunk + kChunk <= cut.body_end; chunk += stride) add_chunk(std::true_type{}, chunk + lane_offset);
  if (chunk < cut.body_end) add_chunk(std::false_type{}, chunk + lane_offset);

  const auto stats = merge_over_row<Pass>(pass.finish());
  if (threadIdx.x != 0) return;
  if (parts == 1) return finish_row(op, row, stats);
  static_cast<typename Pass::Stats*>(op.parts.memory)[unit] = stats;
}

// Rows of several parts: a warp merges them, in a fixed order.
template <typename Pass, typename Op>
__global__ void __launch_bounds__(kMostThreads) merge_parts_kernel(const __grid_constant__ Op op) {
  using Stats = typename Pass::Stats;
  static_assert(sizeof(Stats) <= kPartBytes);
  const int64_t row = flat_block() * blockDim.y + threadIdx.y;
  if (row >= op.logits.rows || skip_row(op, row, false)) return;
  const Stats* parts = static_cast<const Stats*>(op.parts.memory) + row * op.parts.count;
  const Stats stats = Pass::merge_lanes(threadIdx.x < op.parts.count ? parts[threadIdx.x] : Stats{});
  if (threadIdx.x == 0) finish_row(op, row, stats);
}

}  // namespace tilewise
