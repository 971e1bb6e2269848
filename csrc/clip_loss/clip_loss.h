// clip_loss: the mean of InfoNCE over the rows and over the columns of z = scale S, S = X Y^T (N, N), with the
// positives on the diagonal; a chunk of rows of S at a time. All pairs of a row or a column but its positive are its
// others:
//
//   gap = log sum e^z of the others - z_ii     1 - p_ii = sigmoid(gap)
//   loss_i = (softplus(gap of row i) + softplus(gap of column i)) / 2
//
// What the others of a confident row share is never the rest of 1. Forward: S gives the others of its rows, and joins
// them to those of every column. Backward: S again, and from it G = dL/dz with the upstream u of every row,
//
//   G_ij = u_i row_weight_i e^(z_ij - row_max_i) + u_j column_weight_j e^(z_ij - column_max_j)     G_ii = -u_i share_i
//   grad_x = G Y    grad_y += G^T X
//
// z is rounded before anything is taken off it, forward and backward alike: then the weights of a row add up to its
// share, and gradients of nearly equal vectors cancel as they should.
#pragma once

#include "common/isa.h"
#include "rows/rows.h"

namespace tilewise {

constexpr int64_t kClipState = 5;  // numbers of a row

// Lines of N numbers. Until finish_pair, maxima and sums of e^(z - max) are those of the others, and share is z_ii.
template <typename T>
struct ClipState {
  T* row_max = nullptr;
  T* row_weight = nullptr;  // 1 / (2 sum e^(z - max))
  T* column_max = nullptr;
  T* column_weight = nullptr;
  T* share = nullptr;  // the mean of 1 - p_ii over row and column
};

template <typename T>
ClipState<T> clip_state(T* state, int64_t rows) {
  return {state, state + rows, state + 2 * rows, state + 3 * rows, state + 4 * rows};
}

template <typename T>
struct ClipChunk {
  T* similarities = nullptr;  // (rows, columns), which the CPU overwrites
  int64_t first = 0;          // row of the chunk, among all
  int64_t rows = 0;
  int64_t columns = 0;
  const T* scale = nullptr;
  ClipState<T> state;  // of all rows
  // Backward: G may be the similarities themselves.
  const T* grad_loss = nullptr;  // (columns,), null: 1
  Dtype gradient_dtype = Dtype::kFloat32;
  void* gradient = nullptr;  // (rows, columns)
};

// Maximum and sum of e^(z - max) of some pairs.
template <typename T>
struct alignas(2 * sizeof(T)) ClipPart {
  T max = -infinity<T>();
  T sum = 0;
};

// -inf less itself is no number: where nothing but -inf was seen, 0 is taken off.
template <typename V>
TILEWISE_FN V clip_shift(V max) {
  return max == -infinity<V>() ? V(0) : max;
}

template <typename T>
TILEWISE_FN ClipPart<T> joined(const ClipPart<T>& a, const ClipPart<T>& b) {
  const T max = b.max > a.max ? b.max : a.max;
  const T shift = clip_shift(max);
  return {max, a.sum * fast_exp(a.max - shift) + b.sum * fast_exp(b.max - shift)};
}

// What the forward leaves of all rows.
template <typename T>
struct ClipLosses {
  ClipState<T> state;
  T* loss_rows = nullptr;   // (rows,)
  T* share_rows = nullptr;  // (rows,) of the mean: 1
  int64_t rows = 0;
};

template <typename T>
struct ClipSide {
  T max, weight, loss, share;
};

template <typename T>
TILEWISE_FN ClipSide<T> clip_side(T positive, T max, T sum) {
  const T gap = (max - positive) + natural_log(sum);  // -inf without others
  const bool first = positive > max;
  const T e = fast_exp(first ? max - positive : positive - max);
  return {first ? positive : max, T(0.5) / (first ? T(1) + sum * e : sum + e), softplus(gap), sigmoid(gap)};
}

template <typename T>
TILEWISE_FN void finish_pair(const ClipLosses<T>& op, int64_t i) {
  const ClipState<T>& s = op.state;
  const T positive = s.share[i];
  const ClipSide<T> row = clip_side(positive, s.row_max[i], s.row_weight[i]);
  const ClipSide<T> column = clip_side(positive, s.column_max[i], s.column_weight[i]);
  s.row_max[i] = row.max;
  s.row_weight[i] = row.weight;
  s.column_max[i] = column.max;
  s.column_weight[i] = column.weight;
  s.share[i] = T(0.5) * (row.share + column.share);
  op.loss_rows[i] = T(0.5) * (row.loss + column.loss);
  op.share_rows[i] = T(1);
}

template <typename T>
struct ClipKernels {
  void (*take_rows)(const ClipChunk<T>&, int64_t begin, int64_t end);     // rows [begin, end): z stands over them
  void (*take_columns)(const ClipChunk<T>&, int64_t begin, int64_t end);  // of z
  void (*finish)(const ClipLosses<T>&, int64_t begin, int64_t end);
  void (*gradient)(const ClipChunk<T>&, int64_t begin, int64_t end);  // rows, over the similarities
};
TILEWISE_DECLARE_KERNELS(ForTypes<ClipKernels>, clip_kernels)

// On a GPU a chunk is cut into tiles, whose maxima and sums meet in memory: those of a row side by side, those of a
// column one band of rows after the other.
constexpr int64_t kClipTileRows = 32, kClipTileColumns = 256;

struct ClipParts {
  ClipPart<float>* rows = nullptr;     // (rows, strips)
  ClipPart<float>* columns = nullptr;  // (bands, columns)
};

TILEWISE_FN constexpr int64_t clip_strips(int64_t columns) {
  return (columns + kClipTileColumns - 1) / kClipTileColumns;
}
TILEWISE_FN constexpr int64_t clip_bands(int64_t rows) { return (rows + kClipTileRows - 1) / kClipTileRows; }

// A CUDA error string, or null.
const char* clip_statistics_cuda(const ClipChunk<float>& chunk, const ClipParts& parts, void* stream);
const char* clip_finish_cuda(const ClipLosses<float>& losses, const RowReduction<float>& reduction, void* stream);
const char* clip_gradient_cuda(const ClipChunk<float>& chunk, void* stream);

}  // namespace tilewise
