// The gradient pass: one group of threads per (row, tile). Every thread forms the coefficients of its row, then one
// formula (PlainSoftmaxGradient, FullSoftmaxGradient or AffineGradient) turns elements into gradients.
#pragma once

#include "rows/access.cuh"

namespace tilewise {

// p_k = e^(x_k - max - log_sum) as factor 2^(x_k log2e - reference)
struct Probability {
  float reference;
  float factor;

  __device__ explicit Probability(const RowGradient<float>& g)
      : reference(g.max * kLog2E), factor(::expf(-g.log_sum) * correction(g.max, reference)) {}
  __device__ __forceinline__ float unscaled(float x) const { return fast_exp2(fmaf(x, kLog2E, -reference)); }
};

// Identity transform, no g_entropy, coefficients c that are the same for every column:  p_k alpha - g c
struct PlainSoftmaxGradient : NoSide {
  static constexpr int kBatch = 4;
  static constexpr int kBlocks = 4;

  Probability probability;
  float scale;
  float constant;

  template <typename Op>
  __device__ PlainSoftmaxGradient(const Op& op, int64_t, int64_t, const RowGradient<float>& g)
      : probability(g), scale(g.alpha * probability.factor), constant(-g.dense * op.dense.uniform) {}

  template <int kCount>
  __device__ __forceinline__ void apply(float (&x)[kCount], Side<kCount>, int64_t, int target,
                                        const RowGradient<float>& g) const {
    if (static_cast<unsigned>(target) < kCount) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = softmax_gradient(g, x[i], target == i ? -constant - g.gamma : -constant);
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fmaf(probability.unscaled(x[i]), scale, constant);
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
  Dense dense;

  template <typename Op>
  __device__ FullSoftmaxGradient(const Op& op, int64_t row, int64_t first_run, const RowGradient<float>&)
      : transform(op.transform), dense(op.dense, row, first_run) {}

  template <int kCount>
  __device__ __forceinline__ Side<kCount> fetch(int64_t column) const {
    return dense.template fetch<kCount>(column);
  }

  template <int kCount>
  __device__ __forceinline__ void apply(float (&x)[kCount], const Side<kCount>& side, int64_t column, int target,
                                        const RowGradient<float>& g) const {
    float c[kCount] = {};
    if (dense.active) dense.coefficients(side, column, c);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = tilewise::apply(transform, x[i]);
      x[i] = softmax_gradient(g, x[i], g.dense * c[i] - (target == i ? g.gamma : 0.0f)) * slope(transform, x[i]);
    }
  }
};

// lambda rate (x_k - mean) + kappa
struct AffineGradient : NoSide {
  static constexpr int kBatch = 4;
  static constexpr int kBlocks = 4;

  template <typename Op>
  __device__ AffineGradient(const Op&, int64_t, int64_t, const RowGradient<float>&) {}

  template <int kCount>
  __device__ __forceinline__ void apply(float (&x)[kCount], Side<kCount>, int64_t, int target,
                                        const RowGradient<float>& g) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      x[i] = fmaf(g.lambda, g.rate * (x[i] - g.mean), g.kappa) + (target == i ? g.gamma : 0.0f);
  }
};

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
  const int64_t rest = cut.body_end - base;
  const int body = rest >= tile ? tile : rest > 0 ? static_cast<int>(rest) : 0;
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

}  // namespace tilewise
