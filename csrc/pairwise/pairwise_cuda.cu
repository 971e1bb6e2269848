// The pairwise engine on CUDA: a warp or a block per row of similarities (pairwise/row.cuh), and the labels of all
// columns in 32 bits.
#include <algorithm>

#include "pairwise/programs.h"
#include "pairwise/row.cuh"
#include "rows/rows.cuh"

namespace tilewise {
namespace {

template <typename Storage, typename Program>
__global__ void __launch_bounds__(kMostThreads)
    pairwise_kernel(const __grid_constant__ PairwiseChunk<float> chunk, uint32_t vectors) {
  const int64_t index = flat_block() * blockDim.y + threadIdx.y;
  if (index >= chunk.rows) return;  // all threads of the row alike
  Row<Storage> row(chunk, index, vectors);
  run_program(Program{}, row, chunk.parameters);
}

constexpr unsigned kLabelThreads = 64;  // of a block: there are few labels

__global__ void __launch_bounds__(kLabelThreads) short_labels_kernel(const __grid_constant__ ShortLabels op) {
  const int64_t column = flat_block() * blockDim.x + threadIdx.x;
  if (column >= op.columns) return;
  const int64_t label = op.labels[column];
  op.shorts[column] = static_cast<int32_t>(label);
  if (op.shorts[column] != label) write_relaxed(op.too_long, 1);
}

// Vectors of pairs in a row; none where rows do not lie as vectors do, or the relations of pairs are no matter of short
// labels.
template <typename Storage>
uint32_t vectors_of(const PairwiseChunk<float>& chunk) {
  const Relations<float>& relations = chunk.relations;
  const auto lies = [&](const void* rows, size_t item) {
    return reinterpret_cast<uintptr_t>(rows) % (kPairVector * item) == 0 && chunk.row_stride % kPairVector == 0;
  };
  if (relations.short_labels == nullptr || relations.guide != nullptr) return 0;
  if (!lies(chunk.similarities, sizeof(float)) || !lies(chunk.gradient, sizeof(Storage))) return 0;
  return static_cast<uint32_t>(std::min<int64_t>(chunk.columns / kPairVector, int64_t{1} << 31));
}

template <typename Storage, typename Program>
const char* launch_rows(const PairwiseChunk<float>& chunk, void* stream) {
  const dim3 block = row_block(chunk.columns);
  const size_t shared = 2 * block.x / kWarp * sizeof(Values<float, kMostValues>);
  return launch(pairwise_kernel<Storage, Program>, flat_grid((chunk.rows + block.y - 1) / block.y), block, shared,
                stream, chunk, vectors_of<Storage>(chunk));
}

}  // namespace

const char* short_labels_cuda(const ShortLabels& op, void* stream) {
  return launch(short_labels_kernel, flat_grid((op.columns + kLabelThreads - 1) / kLabelThreads), dim3(kLabelThreads),
                0, stream, op);
}

const char* pairwise_cuda(const PairwiseChunk<float>& chunk, void* stream) {
  if (chunk.rows == 0) return nullptr;
  return with_storage(chunk.gradient_dtype, [&](auto storage) {
    const auto launch_program = [&](auto program) {
      return launch_rows<decltype(storage), decltype(program)>(chunk, stream);
    };
    return with_program(chunk.program, launch_program, PairPrograms{});
  });
}

const char* pairwise_reduction_cuda(const RowReduction<float>& reduction, void* stream) {
  return launch_row_reduction(reduction, stream);
}

}  // namespace tilewise
