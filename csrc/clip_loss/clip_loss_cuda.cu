// clip_loss on CUDA. A block brings a tile of z into shared memory, once: a thread walks each of its columns, a warp
// some of its rows. What tiles found is merged in a fixed order. Backward, threads keep the numbers of their columns
// while rows pass by.
#include "clip_loss/clip_loss.h"
#include "common/vector.cuh"
#include "rows/rows.cuh"

namespace tilewise {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTileRows = kClipTileRows, kTileColumns = kClipTileColumns;
constexpr int kPiece = kVector<float>;
constexpr int kWalked = 8;     // rows that a column takes at a time
constexpr int kFinished = 64;  // threads of a block, for few have much to do
constexpr int kPassing = 16;   // rows that pass a thread backward
static_assert(kTileColumns == kThreads && kTileColumns / kWarp == 2 * kPiece && kTileRows % (4 * kWarps) == 0);

struct Most {  // NaN is left to the sums
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// As many of `left` as a thread or a tile takes.
__device__ __forceinline__ int up_to(int most, int64_t left) {
  return left < 0 ? 0 : left < most ? static_cast<int>(left) : most;
}

// Rounded before anything is taken off it: no product that a subtraction swallows.
__device__ __forceinline__ float score(float scale, float s) { return __fmul_rn(scale, s); }

// The positive of a row, if it is among kCount columns from `column`: its z goes to its place, and -inf stands here.
template <int kCount>
__device__ __forceinline__ void set_positive_aside(const ClipChunk<float>& chunk, int64_t row, int64_t column,
                                                   float (&z)[kCount]) {
  const int64_t own = chunk.first + row - column;
  if (own < 0 || own >= kCount) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (own != i) continue;
    chunk.state.share[chunk.first + row] = z[i];
    z[i] = -infinity<float>();
  }
}

// A thread has kCount columns of every kStep-th row; -inf beyond the matrix.
template <bool kAligned>
__device__ __forceinline__ void load_tile(const ClipChunk<float>& chunk, int64_t first_row, int64_t first_column,
                                          float* tile) {
  constexpr int kCount = kAligned ? kPiece : 1;
  constexpr int kAcross = kTileColumns / kCount;
  constexpr int kStep = kThreads / kAcross;
  constexpr int kTogether = 8;
  const int across = static_cast<int>(threadIdx.x) % kAcross * kCount, down = static_cast<int>(threadIdx.x) / kAcross;
  const int64_t column = first_column + across;
  const int rows = column < chunk.columns ? up_to(kTileRows, chunk.rows - first_row) : 0;  // that this thread finds
  const float* from = chunk.similarities + first_row * chunk.columns + column;
  const int64_t left = chunk.first + first_row - first_column;  // of the tile, to its positives
  const bool crosses = left > -kTileRows && left < kTileColumns;
  const float scale = *chunk.scale;
#pragma unroll 1
  for (int begin = down; begin < kTileRows; begin += kTogether * kStep) {
    Run<float, kCount> runs[kTogether] = {};
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int row = begin + k * kStep;
      if (row >= rows) continue;
      if constexpr (kAligned) {
        runs[k] = load_vectors<true, kCount>(from + row * chunk.columns);
      } else {
        runs[k].value[0] = from[row * chunk.columns];
      }
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int row = begin + k * kStep;
      float z[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) z[i] = row < rows ? score(scale, runs[k].value[i]) : -infinity<float>();
      if (crosses && row < rows) set_positive_aside(chunk, first_row + row, column, z);
      memcpy(tile + row * kTileColumns + across, z, sizeof(z));
    }
  }
}

// Of one column of the tile.
__device__ __forceinline__ ClipPart<float> walk_column(const float* column) {
  ClipPart<float> part;
#pragma unroll
  for (int begin = 0; begin < kTileRows; begin += kWalked) {
    float z[kWalked], top = part.max;
#pragma unroll
    for (int i = 0; i < kWalked; ++i) {
      z[i] = column[(begin + i) * kTileColumns];
      top = Most()(top, z[i]);
    }
    const float shift = clip_shift(top);
    float sum = part.sum * fast_exp(part.max - shift);
#pragma unroll
    for (int i = 0; i < kWalked; ++i) sum += fast_exp(z[i] - shift);
    part = {top, sum};
  }
  return part;
}

// Of one row of the tile, by a warp.
__device__ __forceinline__ ClipPart<float> walk_row(const float* row) {
  float z[2 * kPiece], top = -infinity<float>();
  const Warp warp;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    memcpy(z + half * kPiece, row + (half * kWarp + warp.rank()) * kPiece, kPiece * sizeof(float));
#pragma unroll
  for (int i = 0; i < 2 * kPiece; ++i) top = Most()(top, z[i]);
  top = warp.all(top, Most{});
  const float shift = clip_shift(top);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 2 * kPiece; ++i) sum += fast_exp(z[i] - shift);
  return {top, warp.all_sum(sum)};
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads, 4)
    clip_statistics_kernel(const __grid_constant__ ClipChunk<float> chunk, const ClipParts parts) {
  float* tile = static_cast<float*>(dynamic_shared());
  const int64_t strip = blockIdx.x, band = blockIdx.y;
  const int64_t first_row = band * kTileRows, first_column = strip * kTileColumns;
  load_tile<kAligned>(chunk, first_row, first_column, tile);
  __syncthreads();
  const ClipPart<float> of_column = walk_column(tile + threadIdx.x);
  const int64_t column = first_column + threadIdx.x;
  if (column < chunk.columns) parts.columns[band * chunk.columns + column] = of_column;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll 2
  for (int turn = 0; turn < kTileRows / kWarps; ++turn) {
    const int row = turn * kWarps + warp;
    const ClipPart<float> of_row = walk_row(tile + row * kTileColumns);
    if (Warp().first() && first_row + row < chunk.rows) parts.rows[(first_row + row) * gridDim.x + strip] = of_row;
  }
}

// A warp for each row; after those blocks a thread for each column, with what earlier chunks left.
__global__ void __launch_bounds__(kThreads)
    clip_merge_kernel(const __grid_constant__ ClipChunk<float> chunk, const ClipParts parts, int64_t row_blocks) {
  const ClipState<float>& state = chunk.state;
  ClipPart<float> found;
  if (flat_block() < row_blocks) {
    const int64_t row = flat_block() * kWarps + threadIdx.x / kWarp, strips = clip_strips(chunk.columns);
    if (row >= chunk.rows) return;
    const Warp warp;
#pragma unroll 4
    for (int64_t strip = warp.rank(); strip < strips; strip += kWarp)
      found = joined(found, parts.rows[row * strips + strip]);
    const float top = warp.all(found.max, Most{});
    const float sum = warp.all_sum(found.sum * fast_exp(found.max - clip_shift(top)));
    if (!warp.first()) return;
    state.row_max[chunk.first + row] = top;
    state.row_weight[chunk.first + row] = sum;
    return;
  }
  const int64_t column = (flat_block() - row_blocks) * kThreads + threadIdx.x;
  if (column >= chunk.columns) return;
  if (chunk.first > 0) found = {state.column_max[column], state.column_weight[column]};
  const int64_t bands = clip_bands(chunk.rows);
#pragma unroll 4
  for (int64_t band = 0; band < bands; ++band) found = joined(found, parts.columns[band * chunk.columns + column]);
  state.column_max[column] = found.max;
  state.column_weight[column] = found.sum;
}

__global__ void __launch_bounds__(kFinished) clip_finish_kernel(const __grid_constant__ ClipLosses<float> losses) {
  const int64_t row = flat_block() * kFinished + threadIdx.x;
  if (row < losses.rows) finish_pair(losses, row);
}

struct alignas(16) PassingRow {
  float max, weight, positive, unused;
};

// kCount columns of a thread: side by side where they are aligned, else a block apart. Loads of several rows are on
// their way together, which the compiler may not do: gradients may stand over the similarities.
template <typename Storage, bool kAligned>
__global__ void __launch_bounds__(kThreads) clip_gradient_kernel(const __grid_constant__ ClipChunk<float> chunk) {
  constexpr int kCount = kVector<Storage>;
  constexpr int kApart = kAligned ? 1 : kThreads;
  constexpr int kTogether = 16 / kCount;
  const ClipState<float>& state = chunk.state;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kPassing;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kCount +
                        static_cast<int64_t>(threadIdx.x) * (kAligned ? kCount : 1);
  const int rows = up_to(kPassing, chunk.rows - first_row), inside = up_to(kCount * kApart, chunk.columns - first);
  auto* passing = static_cast<PassingRow*>(dynamic_shared());
  if (static_cast<int>(threadIdx.x) < rows) {
    const int64_t own = chunk.first + first_row + threadIdx.x;
    const float upstream = chunk.grad_loss != nullptr ? chunk.grad_loss[own] : 1.0f;
    passing[threadIdx.x] = {state.row_max[own], upstream * state.row_weight[own], -upstream * state.share[own], 0.0f};
  }
  float max[kCount] = {}, weight[kCount] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i * kApart >= inside) continue;
    max[i] = state.column_max[first + i * kApart];
    weight[i] = state.column_weight[first + i * kApart];
    if (chunk.grad_loss != nullptr) weight[i] *= chunk.grad_loss[first + i * kApart];
  }
  const float scale = *chunk.scale;
  const float* from = chunk.similarities + first_row * chunk.columns + first;
  Storage* to = static_cast<Storage*>(chunk.gradient) + first_row * chunk.columns + first;
  const int64_t own = chunk.first + first_row - first;  // the place of row 0's positive
  __syncthreads();
#pragma unroll 1
  for (int begin = 0; begin < kPassing; begin += kTogether) {
    Run<float, kCount> runs[kTogether] = {};
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (begin + k >= rows) continue;
      if constexpr (kAligned) {
        if (inside > 0) runs[k] = load_vectors<true, kCount>(from + (begin + k) * chunk.columns);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          if (i * kApart < inside) runs[k].value[i] = from[(begin + k) * chunk.columns + i * kApart];
      }
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int row = begin + k;
      if (row >= rows) continue;
      const PassingRow of_row = passing[row];
      float g[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float z = score(scale, runs[k].value[i]);
        g[i] = of_row.weight * fast_exp(z - of_row.max) + weight[i] * fast_exp(z - max[i]);
      }
      if (own + row >= 0 && own + row < kCount * kApart) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) g[i] = own + row == i * kApart ? of_row.positive : g[i];
      }
      if constexpr (kAligned) {
        if (inside > 0) store_vectors(to + row * chunk.columns, narrow<Storage>(g));
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          if (i * kApart < inside) from_float(g[i], to[row * chunk.columns + i * kApart]);
      }
    }
  }
}

// A chunk with more bands than a grid has is no chunk that fits in memory: it has as many columns as rows.
dim3 grid_of(int64_t strips, int64_t bands) {
  return dim3(static_cast<unsigned>(strips), static_cast<unsigned>(bands));
}

bool is_aligned(const void* matrix, int64_t columns, int vector) {
  return columns % vector == 0 && reinterpret_cast<uintptr_t>(matrix) % 16 == 0;
}

template <typename Storage>
const char* launch_gradient(const ClipChunk<float>& chunk, void* stream) {
  constexpr int64_t kColumns = kThreads * kVector<Storage>;
  const dim3 grid = grid_of((chunk.columns + kColumns - 1) / kColumns, (chunk.rows + kPassing - 1) / kPassing);
  const bool aligned = is_aligned(chunk.similarities, chunk.columns, kVector<Storage>) &&
                       is_aligned(chunk.gradient, chunk.columns, kVector<Storage>);
  const auto kernel = aligned ? clip_gradient_kernel<Storage, true> : clip_gradient_kernel<Storage, false>;
  return launch(kernel, grid, dim3(kThreads), kPassing * sizeof(PassingRow), stream, chunk);
}

}  // namespace

const char* clip_statistics_cuda(const ClipChunk<float>& chunk, const ClipParts& parts, void* stream) {
  if (chunk.rows == 0) return nullptr;
  constexpr size_t kShared = sizeof(float) * kTileRows * kTileColumns;
  const dim3 grid = grid_of(clip_strips(chunk.columns), clip_bands(chunk.rows));
  const auto kernel = is_aligned(chunk.similarities, chunk.columns, kPiece) ? clip_statistics_kernel<true>
                                                                            : clip_statistics_kernel<false>;
  const char* error = launch(kernel, grid, dim3(kThreads), kShared, stream, chunk, parts);
  if (error != nullptr) return error;
  const int64_t row_blocks = (chunk.rows + kWarps - 1) / kWarps;
  const int64_t column_blocks = (chunk.columns + kThreads - 1) / kThreads;
  return launch(clip_merge_kernel, flat_grid(row_blocks + column_blocks), dim3(kThreads), 0, stream, chunk, parts,
                row_blocks);
}

const char* clip_finish_cuda(const ClipLosses<float>& losses, const RowReduction<float>& reduction, void* stream) {
  const int64_t blocks = (losses.rows + kFinished - 1) / kFinished;
  const char* error = launch(clip_finish_kernel, flat_grid(blocks), dim3(kFinished), 0, stream, losses);
  return error != nullptr ? error : launch_row_reduction(reduction, stream);
}

const char* clip_gradient_cuda(const ClipChunk<float>& chunk, void* stream) {
  if (chunk.rows == 0) return nullptr;
  return with_storage(chunk.gradient_dtype,
                      [&](auto storage) { return launch_gradient<decltype(storage)>(chunk, stream); });
}

}  // namespace tilewise
