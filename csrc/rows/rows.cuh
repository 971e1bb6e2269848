// The CUDA row engine (see rows.h for what an operator provides): the launches an operator's .cu file chooses from.
//
// A row is cut at 16-byte boundaries of the matrix that decides (the logits going forward, the gradient going back):
// [head) [whole vectors) [tail). Head and tail, less than a vector each, go element by element, so a row that starts
// anywhere still moves as vectors. A row without unit stride is all head.
#pragma once

#include "common/team.cuh"
#include "rows/gradient.cuh"
#include "rows/statistics.cuh"

namespace tilewise {

// One block; sums in double and in a fixed order.
static __global__ void __launch_bounds__(512) row_reduction_kernel(const __grid_constant__ RowReduction<float> op) {
  double loss = 0.0;
  double total = 0.0;
#pragma unroll 4
  for (int64_t row = threadIdx.x; row < op.rows; row += blockDim.x) {
    loss += op.loss_rows[row];
    total += op.share_rows[row];
  }
  const Team team(dynamic_shared());
  loss = team.all_sum(loss);
  total = team.all_sum(total);
  if (!team.first()) return;
  *op.total = static_cast<float>(total);
  if (op.reduction == Reduction::kSum) *op.loss = static_cast<float>(loss / op.divisor);
  if (op.reduction == Reduction::kMean) *op.loss = total == 0.0 ? 0.0f : static_cast<float>(loss / total);
}

// (threads of a row, rows of a block)
inline dim3 row_block(int64_t columns) {
  if (columns <= 1024) return dim3(kWarp, kMostThreads / kWarp);
  return dim3(columns <= 8192 ? kMostThreads / 2 : kMostThreads);
}

template <typename Storage, typename Pass, typename Op>
const char* launch_row_statistics(const Op& op, void* stream) {
  if (op.logits.rows == 0) return nullptr;
  const dim3 block = row_block(op.logits.columns);
  const int64_t blocks = (op.logits.rows * op.parts.count + block.y - 1) / block.y;
  const char* error = launch(row_statistics_kernel<Storage, Pass, Op>, flat_grid(blocks), block,
                             block.x / kWarp * sizeof(typename Pass::Stats), stream, op);
  if (op.parts.count == 1 || error != nullptr) return error;
  const dim3 merging(kWarp, kMostThreads / kWarp);
  return launch(merge_parts_kernel<Pass, Op>, flat_grid((op.logits.rows + merging.y - 1) / merging.y), merging, 0,
                stream, op);
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
  return launch(row_reduction_kernel, dim3(1), dim3(kThreads), kTeamBytes, stream, op);
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
