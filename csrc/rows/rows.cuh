// The CUDA row engine (see rows.h for what an operator provides).
//
// Statistics: one group of threads per row (a warp up to 1024 columns, else a block). Each thread streams its
// share of the row through registers into a pass object, and the objects are merged in a fixed order.
// Gradient: one group per (row, tile); every thread forms the coefficients of the row, then one formula per element.
//
// A row is cut at 16-byte boundaries of the matrix that decides (the logits going forward, the gradient going
// back): [head) [whole vectors) [tail). Head and tail, less than a vector each, go element by element, so a row
// that starts anywhere still moves as vectors. A row without unit stride is all head.
#pragma once

#include "rows/access.cuh"

namespace tilewise {

inline constexpr int kWarp = 32;
inline constexpr float kLog2E = 1.44269504088896341f;

inline constexpr int kMostThreads = 256;  // of a block

// ---- merging over lanes

template <typename T>
__device__ __forceinline__ T lane_sum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ __forceinline__ float lane_max(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

__device__ __forceinline__ int64_t lane_min(int64_t value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const long long other = __shfl_xor_sync(0xffffffffu, static_cast<long long>(value), offset);
    value = other < value ? other : value;
  }
  return value;
}

// ---- passes: what one thread gathers

// e^(x - max) as 2^(x log2e - reference), one fused instruction. The reference is max log2e rounded, which is off by
// up to 2^-11 at max = 1e4; correction() is exactly that error, applied once per row instead of once per element.
__device__ __forceinline__ float correction(float max, float reference) {
  return fast_exp2(-fmaf(max, kLog2E, -reference));
}

// max and sum, nothing else: five instructions per element.
struct PlainSoftmax {
  using Stats = SoftmaxStats<float>;
  static constexpr int kBatch = 4;
  static constexpr int kBlocks = 4;
  template <int kCount>
  struct Side {};
  // The reference follows the maximum only when it lags by more than this: rescaling is then rare.
  static constexpr float kSlack = 4.0f;

  float max = -infinity<float>();
  float ceiling = -infinity<float>();
  float reference = 0.0f;
  float sum = 0.0f;

  template <typename Op>
  __device__ PlainSoftmax(const Op&, int64_t, int64_t) {}

  template <int kCount>
  __device__ __forceinline__ Side<kCount> fetch(int64_t) const {
    return {};
  }

  template <int kCount>
  __device__ __forceinline__ void add(const float (&x)[kCount], Side<kCount>, int64_t) {
    float top = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) top = fmaxf(top, x[i]);
    max = fmaxf(max, top);
    if (top > ceiling) {
      const float next = top * kLog2E;
      sum = sum == 0.0f ? 0.0f : sum * fast_exp2(reference - next);
      reference = next;
      ceiling = top + kSlack;
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
    rebase(stats, lane_max(stats.max));
    stats.sum = lane_sum(stats.sum);
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
  __device__ __forceinline__ void add(float (&x)[kCount], const Side<kCount>& side,
                                      int64_t column) {
    if (!plain) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = apply(transform, x[i]);
    }
    float top = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) top = fmaxf(top, x[i]);
    if (details && (top > stats.max || (top == stats.max && column < stats.argmax))) {
#pragma unroll
      for (int i = kCount - 1; i >= 0; --i) stats.argmax = x[i] == top ? column + i : stats.argmax;
    }
    if (top > stats.max) rebase(stats, top);
    // While only -inf was seen, x - base is -inf, not NaN.
    const float base = stats.max > -infinity<float>() ? stats.max : 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float e = fast_exp(x[i] - base);
      stats.sum += e;
      if (details) stats.spread += e * fmaxf(x[i] - base, ExpFloor<float>::value);
    }
    if (dense.active) {
      float c[kCount];
      dense.coefficients(side, column, c);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        stats.mass += c[i];
        stats.cross += c[i] != 0.0f ? c[i] * (x[i] - base) : 0.0f;
      }
    }
  }

  __device__ Stats finish() const { return stats; }

  static __device__ __forceinline__ Stats merge_lanes(Stats stats) {
    const float max = lane_max(stats.max);
    stats.argmax = lane_min(stats.max == max ? stats.argmax : INT64_MAX);
    rebase(stats, max);
    stats.sum = lane_sum(stats.sum);
    stats.mass = lane_sum(stats.mass);
    stats.cross = lane_sum(stats.cross);
    stats.spread = lane_sum(stats.spread);
    return stats;
  }
};

// Mean and M2. With n values seen, a run of k and deviations d from the mean so far:
//   mean' = mean + sum d / (n + k),   M2' = M2 + sum d^2 - (sum d)^2 / (n + k)
// The subtraction never cancels: the first value starts the mean, and later n + k > k.
struct RowMoments {
  using Stats = MomentStats<float>;
  static constexpr int kBatch = 4;
  static constexpr int kBlocks = 4;
  template <int kCount>
  struct Side {};

  Stats stats;

  template <typename Op>
  __device__ RowMoments(const Op&, int64_t, int64_t) {}

  template <int kCount>
  __device__ __forceinline__ Side<kCount> fetch(int64_t) const {
    return {};
  }

  template <int kCount>
  __device__ __forceinline__ void add(const float (&x)[kCount], Side<kCount>, int64_t) {
    if (stats.count == 0.0f) stats.mean = x[0];
    float sum = 0.0f;
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float d = x[i] - stats.mean;
      sum += d;
      square = fmaf(d, d, square);
    }
    stats.count += kCount;
    const float step = fast_divide(sum, stats.count);
    stats.mean += step;
    stats.m2 += fmaf(-sum, step, square);
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
      merge(stats, other);
    }
    return stats;
  }
};

// ---- the statistics kernel

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

// Block (threads of a row, rows): several rows only where a row is one warp. A warp takes kBatch consecutive groups
// of 32 vectors at a time, all loaded before the first is used.
template <typename Storage, typename Pass, typename Op>
__global__ void __launch_bounds__(kMostThreads, Pass::kBlocks) row_statistics_kernel(const __grid_constant__ Op op) {
  constexpr int kRun = kVector<Storage>;
  constexpr int kHop = kWarp * kRun;
  constexpr int kChunk = Pass::kBatch * kHop;
  const int64_t row = flat_block() * blockDim.y + threadIdx.y;
  if (row >= op.logits.rows || skip_row(op, row)) return;  // all threads of the row alike
  const RowCut cut = RowCut::of<Storage>(op.logits, row);
  const RowReader<Storage> logits(op.logits, row, cut.head);
  Pass pass(op, row, cut.head);

  for (int64_t i = threadIdx.x; i < cut.scalars; i += blockDim.x) {
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
  const int64_t stride = static_cast<int64_t>(blockDim.x / kWarp) * kChunk;
  int64_t chunk = cut.head + threadIdx.x / kWarp * kChunk;
  for (; chunk + kChunk <= cut.body_end; chunk += stride) add_chunk(std::true_type{}, chunk + lane_offset);
  if (chunk < cut.body_end) add_chunk(std::false_type{}, chunk + lane_offset);

  const auto stats = merge_over_row<Pass>(pass.finish());
  if (threadIdx.x == 0) finish_row(op, row, stats);
}

// ---- formulas: x -> gradient, in place in registers. `target` is the target's place in the run, if 0 <= target < kCount.

template <int kCount>
__device__ __forceinline__ void add_at_target(float (&gradient)[kCount], int target, float gamma) {
  if (static_cast<unsigned>(target) >= kCount) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) gradient[i] += target == i ? gamma : 0.0f;
}

// p_k = e^(x_k - max - log_sum) as factor 2^(x_k log2e - reference)
struct Probability {
  float reference;
  float factor;

  __device__ explicit Probability(const RowGradient<float>& g)
      : reference(g.max * kLog2E), factor(::expf(-g.log_sum) * correction(g.max, reference)) {}
  __device__ __forceinline__ float unscaled(float x) const { return fast_exp2(fmaf(x, kLog2E, -reference)); }
};

// Identity transform, no g_entropy, coefficients c that are the same for every column:  p_k alpha - g c
struct PlainSoftmaxGradient {
  static constexpr int kBatch = 4;
  static constexpr int kBlocks = 4;
  template <int kCount>
  struct Side {};

  Probability probability;
  float scale;
  float constant;

  template <typename Op>
  __device__ PlainSoftmaxGradient(const Op& op, int64_t, int64_t, const RowGradient<float>& g)
      : probability(g), scale(g.alpha * probability.factor), constant(-g.dense * op.dense.uniform) {}

  template <int kCount>
  __device__ __forceinline__ Side<kCount> fetch(int64_t) const {
    return {};
  }

  template <int kCount>
  __device__ __forceinline__ void apply(float (&x)[kCount], Side<kCount>, int64_t, int target,
                                        const RowGradient<float>& g) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fmaf(probability.unscaled(x[i]), scale, constant);
    add_at_target(x, target, g.gamma);
  }
};

template <typename Stored>
struct FullSoftmaxGradient {
  using Dense = DenseRow<Stored>;
  static constexpr int kBatch = 2;
  static constexpr int kBlocks = Dense::kProbabilities ? 2 : 3;
  template <int kCount>
  using Side = Run<typename Dense::Stored, kCount>;

  Transform<float> transform;
  Probability probability;
  Dense dense;

  template <typename Op>
  __device__ FullSoftmaxGradient(const Op& op, int64_t row, int64_t first_run, const RowGradient<float>& g)
      : transform(op.transform), probability(g), dense(op.dense, row, first_run) {}

  template <int kCount>
  __device__ __forceinline__ Side<kCount> fetch(int64_t column) const {
    return dense.template fetch<kCount>(column);
  }

  template <int kCount>
  __device__ __forceinline__ void apply(float (&x)[kCount], const Side<kCount>& side,
                                        int64_t column, int target, const RowGradient<float>& g) const {
    float gradient[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = tilewise::apply(transform, x[i]);
      const float d = fmaxf((x[i] - g.max) - g.log_sum, ExpFloor<float>::value);
      gradient[i] = probability.unscaled(x[i]) * probability.factor * fmaf(g.beta, d, g.alpha);
    }
    if (dense.active) {
      float c[kCount];
      dense.coefficients(side, column, c);
#pragma unroll
      for (int i = 0; i < kCount; ++i) gradient[i] -= g.dense * c[i];
    }
    add_at_target(gradient, target, g.gamma);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = gradient[i] * slope(transform, x[i]);
  }
};

// lambda (x_k - mean) + kappa
struct AffineGradient {
  static constexpr int kBatch = 4;
  static constexpr int kBlocks = 4;
  template <int kCount>
  struct Side {};

  template <typename Op>
  __device__ AffineGradient(const Op&, int64_t, int64_t, const RowGradient<float>&) {}

  template <int kCount>
  __device__ __forceinline__ Side<kCount> fetch(int64_t) const {
    return {};
  }

  template <int kCount>
  __device__ __forceinline__ void apply(float (&x)[kCount], Side<kCount>, int64_t, int target,
                                        const RowGradient<float>& g) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fmaf(g.lambda, x[i] - g.mean, g.kappa);
    add_at_target(x, target, g.gamma);
  }
};

// ---- the gradient kernel

inline constexpr int kTileRuns = 8;  // vectors of a tile per thread

// Block (threads of a tile, rows), chunks as above. The gradient may be the logits, in place: an element is read and
// written by the same thread, the read first.
template <typename Storage, typename Formula, typename Op>
__global__ void __launch_bounds__(kMostThreads, Formula::kBlocks)
    row_gradient_kernel(const __grid_constant__ Op op, int64_t tiles) {
  constexpr int kRun = kVector<Storage>;
  constexpr int kHop = kWarp * kRun;
  constexpr int kChunk = Formula::kBatch * kHop;
  const int64_t unit = flat_block() * blockDim.y + threadIdx.y;
  const int64_t row = tiles == 1 ? unit : unit / tiles;
  if (row >= op.gradient.rows) return;
  const RowGradient<float> g = gradient_of_row(op, row);

  // The tile holds scalars [begin, scalar_end) and, from column `base` on, `body` columns of whole vectors.
  const RowCut cut = RowCut::of<Storage>(op.gradient, row);
  const int tile = static_cast<int>(blockDim.x) * kTileRuns * kRun;
  const int64_t begin = (unit - row * tiles) * tile;
  const int64_t base = cut.head + begin;
  const int64_t scalar_end = begin + tile < cut.scalars ? begin + tile : cut.scalars;
  const int body = base + tile <= cut.body_end ? tile : static_cast<int>(cut.body_end - base);  // < 0: none
  Storage* row_out = static_cast<Storage*>(op.gradient.data) + row * op.gradient.row_stride;
  Storage* out = row_out + base;

  if (g.zero) {
    for (int64_t i = begin + threadIdx.x; i < scalar_end; i += blockDim.x)
      from_float(0.0f, row_out[cut.scalar_column(i) * op.gradient.column_stride]);
    const Run<Storage, kRun> zeros = {};
    for (int i = threadIdx.x * kRun; i < body; i += blockDim.x * kRun) store_vectors(out + i, zeros);
    return;
  }

  const RowReader<Storage> logits(op.logits, row, cut.head);
  const Formula formula(op, row, cut.head, g);

  for (int64_t i = begin + threadIdx.x; i < scalar_end; i += blockDim.x) {
    const int64_t column = cut.scalar_column(i);
    float x[1];
    widen(logits.template read<true, 1>(column), x);
    formula.template apply<1>(x, formula.template fetch<1>(column), column, g.target == column ? 0 : -1, g);
    from_float(x[0], row_out[column * op.gradient.column_stride]);
  }

  const int64_t target_place = g.target - base;
  const int target = target_place >= 0 && target_place < tile ? static_cast<int>(target_place) : -1;
  const auto write_run = [&](const Run<Storage, kRun>& run, const auto& side, int i) {
    float x[kRun];
    widen(run, x);
    formula.template apply<kRun>(x, side, base + i, target - i, g);
    store_vectors(out + i, narrow<Storage>(x));
  };
  if (!logits.vectors) {
    for (int i = threadIdx.x * kRun; i < body; i += blockDim.x * kRun)
      write_run(logits.template read<true, kRun>(base + i), formula.template fetch<kRun>(base + i), i);
    return;
  }
  const Storage* in = logits.data + base;
  const auto write_chunk = [&](auto whole, int first) {
    constexpr bool kWhole = decltype(whole)::value;
    Run<Storage, kRun> runs[Formula::kBatch];
    typename Formula::template Side<kRun> sides[Formula::kBatch];
#pragma unroll
    for (int u = 0; u < Formula::kBatch; ++u) {
      if (!kWhole && first + u * kHop >= body) break;
      runs[u] = load_vectors<true, kRun>(in + first + u * kHop);
      sides[u] = formula.template fetch<kRun>(base + first + u * kHop);
    }
#pragma unroll
    for (int u = 0; u < Formula::kBatch; ++u) {
      if (!kWhole && first + u * kHop >= body) break;
      write_run(runs[u], sides[u], first + u * kHop);
    }
  };
  const int lane_offset = threadIdx.x % kWarp * kRun;
  const int stride = blockDim.x / kWarp * kChunk;
  int chunk = threadIdx.x / kWarp * kChunk;
  for (; chunk + kChunk <= body; chunk += stride) write_chunk(std::true_type{}, chunk + lane_offset);
  if (chunk < body) write_chunk(std::false_type{}, chunk + lane_offset);
}

// ---- reduction of the rows' losses

// One block; sums in double and in a fixed order.
static __global__ void __launch_bounds__(512) row_reduction_kernel(const __grid_constant__ RowReduction<float> op) {
  double loss = 0.0;
  double total = 0.0;
#pragma unroll 4
  for (int64_t row = threadIdx.x; row < op.rows; row += blockDim.x) {
    loss += op.loss_rows[row];
    total += op.share_rows[row];
  }
  loss = lane_sum(loss);
  total = lane_sum(total);
  double* partial = static_cast<double*>(dynamic_shared());  // [warp][loss, total]
  if (threadIdx.x % kWarp == 0) {
    partial[threadIdx.x / kWarp * 2] = loss;
    partial[threadIdx.x / kWarp * 2 + 1] = total;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
    loss += partial[warp * 2];
    total += partial[warp * 2 + 1];
  }
  *op.total = static_cast<float>(total);
  if (op.reduction == Reduction::kSum) *op.loss = static_cast<float>(loss);
  if (op.reduction == Reduction::kMean) *op.loss = total == 0.0 ? 0.0f : static_cast<float>(loss / total);
}

// ---- launches

// (threads of a row, rows of a block)
inline dim3 row_block(int64_t columns) {
  if (columns <= 1024) return dim3(kWarp, kMostThreads / kWarp);
  return dim3(columns <= 8192 ? kMostThreads / 2 : kMostThreads);
}

template <typename Storage, typename Pass, typename Op>
const char* launch_row_statistics(const Op& op, void* stream) {
  if (op.logits.rows == 0) return nullptr;
  const dim3 block = row_block(op.logits.columns);
  const int64_t blocks = (op.logits.rows + block.y - 1) / block.y;
  return launch(row_statistics_kernel<Storage, Pass, Op>, flat_grid(blocks), block,
                block.x / kWarp * sizeof(typename Pass::Stats), stream, op);
}

template <typename Storage, typename Formula, typename Op>
const char* launch_row_gradient(const Op& op, void* stream) {
  if (op.gradient.rows == 0) return nullptr;
  const dim3 block = row_block(op.gradient.columns);
  const int64_t tile = static_cast<int64_t>(block.x) * kTileRuns * kVector<Storage>;
  const int64_t tiles = (op.gradient.columns + tile - 1) / tile;
  const int64_t blocks = (op.gradient.rows * tiles + block.y - 1) / block.y;
  return launch(row_gradient_kernel<Storage, Formula, Op>, flat_grid(blocks), block, 0, stream, op, tiles);
}

inline const char* launch_row_reduction(const RowReduction<float>& op, void* stream) {
  constexpr unsigned kThreads = 512;
  return launch(row_reduction_kernel, dim3(1), dim3(kThreads), kThreads / kWarp * 2 * sizeof(double), stream, op);
}

// Calls f with a value of the storage type of a matrix; f returns a CUDA error string, or null.
template <typename Function>
const char* with_storage(Dtype dtype, Function f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kFloat16:
      return f(Float16{});
    default:
      return "tilewise: the CUDA kernels take float32, bfloat16 and float16 matrices";
  }
}

}  // namespace tilewise
