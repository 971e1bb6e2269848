// Half an iteration over a matrix of costs, on CUDA: one pass at the speed of memory, the exponential of an element
// hidden behind its load. A thread has 4 x 4 numbers at a time, 4 neighbours of 4 lines in memory. Of rows whose
// columns are shared among blocks the last block to end merges the sums, in the order of the columns.
#include "common/vector.cuh"
#include "sinkhorn/half_step.cuh"
#include "sinkhorn/pairs.cuh"

namespace tilewise {
namespace {

constexpr int kWarps = kThreads / kWarp;

__device__ __forceinline__ void merge(RowSum& sum, const RowSum& other) {
  const float top = fmaxf(sum.top, other.top);
  sum.total = sum.total * fast_exp2(sum.top - top) + other.total * fast_exp2(other.top - top);
  sum.top = top;
}

__device__ __forceinline__ void add(RowSum& sum, const float (&score)[4]) {
  const float top = fmaxf(fmaxf(fmaxf(score[0], score[1]), fmaxf(score[2], score[3])), sum.top);
  float total = sum.total * fast_exp2(sum.top - top);
#pragma unroll
  for (int k = 0; k < 4; ++k) total += fast_exp2(score[k] - top);
  sum = {top, total};
}

// The numbers of 4 lines from `at` on; 0 where there are none. By quads they are neighbours, else a warp apart, so that
// those of a warp are.
template <bool kByQuads>
struct Tile {
  static constexpr int kStep = kByQuads ? 1 : kWarp;

  static __device__ __forceinline__ int own() { return static_cast<int>(threadIdx.x) % kWarp * (kByQuads ? 4 : 1); }

  __device__ __forceinline__ Tile(const float* const (&lines)[4], int64_t stride, int left) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if constexpr (kByQuads) {
        const Run<float, 4> run = left > 0 ? load_vectors<false, 4>(lines[r]) : Run<float, 4>{};
#pragma unroll
        for (int k = 0; k < 4; ++k) z[r][k] = run.value[k];
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) z[r][k] = k * kStep < left ? lines[r][k * kStep * stride] : 0.0f;
      }
    }
  }

  float z[4][4];
};

// What a block sums: `rows` by `columns` of a matrix, whose columns have offsets, -inf beyond the last.
struct Block {
  const float* matrix;
  int64_t row_stride, column_stride;
  int rows, columns;
  const float* offsets;
  float factor;
};

// Of a warp's 4 rows, the columns shared among its lanes.
template <bool kByQuads>
__device__ __forceinline__ void sum_along(const Block& block, RowSum (&sums)[4]) {
  const int row = static_cast<int>(threadIdx.x) / kWarp * 4, own = Tile<kByQuads>::own();
  const float* lines[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int inside = row + r < block.rows ? row + r : block.rows - 1;
    lines[r] = block.matrix + inside * block.row_stride + own * block.column_stride;
  }
  for (int column = 0; column < block.columns; column += MatrixParts::kAlongColumns) {
    const Tile<kByQuads> tile(lines, block.column_stride, block.columns - column - own);
    float offset[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) offset[k] = block.offsets[column + own + k * Tile<kByQuads>::kStep];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float score[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) score[k] = fmaf(block.factor, tile.z[r][k], offset[k]);
      add(sums[r], score);
      lines[r] += MatrixParts::kAlongColumns * block.column_stride;
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      merge(sums[r],
            {__shfl_xor_sync(0xffffffffu, sums[r].top, lanes), __shfl_xor_sync(0xffffffffu, sums[r].total, lanes)});
    }
  }
}

// Of a lane's 4 rows, the columns shared among the warps.
template <bool kByQuads>
__device__ __forceinline__ void sum_across(const Block& block, RowSum (&sums)[4]) {
  const int first = static_cast<int>(threadIdx.x) / kWarp * 4, own = Tile<kByQuads>::own();
  const float* matrix = block.matrix + own * block.row_stride;
  for (int column = first; column < block.columns; column += MatrixParts::kAcrossColumns) {
    const float* lines[4];
#pragma unroll
    for (int c = 0; c < 4; ++c)
      lines[c] = matrix + (column + c < block.columns ? column + c : block.columns - 1) * block.column_stride;
    const Tile<kByQuads> tile(lines, block.row_stride, block.rows - own);
    const Quad offset = load_quad(block.offsets + column);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float score[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) score[c] = fmaf(block.factor, tile.z[c][k], offset.value[c]);
      add(sums[k], score);
    }
  }
}

// The sum of row threadIdx.x of the block. shared: a sum for each of the rows that a warp has.
template <bool kAcross, bool kByQuads>
__device__ __forceinline__ RowSum sum_of_row(const Block& block, RowSum* shared) {
  RowSum sums[4] = {{kLowest, 0.0f}, {kLowest, 0.0f}, {kLowest, 0.0f}, {kLowest, 0.0f}};
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if constexpr (kAcross) {
    sum_across<kByQuads>(block, sums);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      shared[warp * MatrixParts::kAcrossRows + Tile<kByQuads>::own() + k * Tile<kByQuads>::kStep] = sums[k];
  } else {
    sum_along<kByQuads>(block, sums);
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int r = 0; r < 4; ++r) shared[warp * 4 + r] = sums[r];
    }
  }
  __syncthreads();
  RowSum sum{kLowest, 0.0f};
  if (threadIdx.x >= block.rows) return sum;
  for (int i = 0; i < (kAcross ? kWarps : 1); ++i) merge(sum, shared[i * MatrixParts::kAcrossRows + threadIdx.x]);
  return sum;
}

template <bool kAcross, bool kByQuads>
__global__ void __launch_bounds__(kThreads, kByQuads ? 4 : 3)
    matrix_half_step_kernel(const __grid_constant__ SinkhornHalfStep step) {
  constexpr int kRows = kAcross ? MatrixParts::kAcrossRows : MatrixParts::kAlongRows;
  constexpr int kColumns = kAcross ? MatrixParts::kAcrossColumns : MatrixParts::kAlongColumns;
  RowSum* of_rows = static_cast<RowSum*>(dynamic_shared());
  float* of_warps = reinterpret_cast<float*>(of_rows + (kAcross ? kWarps : 1) * kRows);
  float* offsets = of_warps + kWarps;
  const Pairs<float>& pairs = step.pairs;
  const MatrixParts& parts = step.parts;
  const int64_t problem = flat_block() / (parts.strips * parts.parts);
  const int64_t rest = flat_block() % (parts.strips * parts.parts), strip = rest / parts.parts,
                part = rest % parts.parts;
  if (problem >= pairs.batch) return;
  // t, or already t + 1 where the first block of the problem has decided: that it goes on, either way.
  if (read_relaxed(step.decision.n_iter + problem) < step.decision.t) return;
  if (step.own == nullptr && !goes_on(step.decision, problem, rest == 0, of_warps)) return;
  const Stage<float> stage = stage_of(step.decision, problem);
  const float inverse = kLog2E / stage.epsilon;
  const int64_t row = strip * kRows, column = part * parts.columns;
  const int64_t rows_left = pairs.rows - row, columns_left = pairs.columns - column;
  Block block{pairs.matrix + problem * pairs.batch_stride + row * pairs.row_stride + column * pairs.column_stride};
  block.row_stride = pairs.row_stride;
  block.column_stride = pairs.column_stride;
  block.rows = static_cast<int>(rows_left < kRows ? rows_left : kRows);
  block.columns = static_cast<int>(columns_left < parts.columns ? columns_left : parts.columns);
  block.offsets = offsets;
  block.factor = -inverse;
  const float* from = (stage.averages() ? step.averaged_from : step.from) + problem * pairs.columns + column;
  const float* marginal = step.other + problem * pairs.columns + column;
  for (int j = threadIdx.x; j < (block.columns + kColumns - 1) / kColumns * kColumns; j += kThreads)
    offsets[j] = j < block.columns ? fmaf(from[j], inverse, ::log2f(marginal[j])) : -infinity<float>();
  __syncthreads();
  RowSum sum = sum_of_row<kAcross, kByQuads>(block, of_rows);
  const bool has_row = threadIdx.x < block.rows;
  const int64_t i = row + threadIdx.x;
  if (parts.parts > 1) {
    RowSum* sums = step.sums + problem * parts.parts * pairs.rows + i;
    if (has_row) sums[part * pairs.rows] = sum;
    unsigned* ticket = step.tickets + problem * parts.strips + strip;
    if (!is_last_block(ticket, parts.parts, reinterpret_cast<unsigned*>(offsets))) return;
    sum = {kLowest, 0.0f};
    for (int64_t p = 0; has_row && p < parts.parts; ++p) {
      const RowSum* other = sums + p * pairs.rows;  // not from a cache that may be older
      merge(sum, {read_relaxed(&other->top), read_relaxed(&other->total)});
    }
  }
  float error = has_row ? finish_row(step, stage, problem, i, sum.top * kLn2, sum.total) : 0.0f;
  if (step.own == nullptr) return;
  error = Team(of_warps).all_sum(error);
  if (threadIdx.x == 0) step.partials[problem * parts.strips + strip] = error;
}

template <bool kAcross, bool kByQuads>
const char* launch_half_step(const SinkhornHalfStep& step, void* stream) {
  constexpr int kSums = kAcross ? kWarps * MatrixParts::kAcrossRows : MatrixParts::kAlongRows;
  constexpr size_t kBytes = kSums * sizeof(RowSum) + (kWarps + MatrixParts::kMostColumns) * sizeof(float);
  return launch(matrix_half_step_kernel<kAcross, kByQuads>,
                flat_grid(step.pairs.batch * step.parts.strips * step.parts.parts), dim3(kThreads), kBytes, stream,
                step);
}

}  // namespace

const char* sinkhorn_matrix_half_step_cuda(const SinkhornHalfStep& step, void* stream) {
  const Pairs<float>& pairs = step.pairs;
  const bool across = step.parts.across;
  const int64_t step_of_lines = across ? pairs.column_stride : pairs.row_stride;
  const bool by_quads = (across ? pairs.row_stride : pairs.column_stride) == 1 && step_of_lines % 4 == 0 &&
                        (across ? pairs.rows : pairs.columns) % 4 == 0 && pairs.batch_stride % 4 == 0 &&
                        reinterpret_cast<uintptr_t>(pairs.matrix) % 16 == 0;
  if (across)
    return by_quads ? launch_half_step<true, true>(step, stream) : launch_half_step<true, false>(step, stream);
  return by_quads ? launch_half_step<false, true>(step, stream) : launch_half_step<false, false>(step, stream);
}

}  // namespace tilewise
