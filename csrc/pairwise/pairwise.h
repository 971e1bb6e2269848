// The pairwise engine: losses over similarities s_ij = <x_i, y_j> of labelled embeddings, a chunk of rows of S at a
// time. Pairs are related by labels; a row's own column, if it has one, is left out by its index, never by its value.
//
//   positive: x_label_i = y_label_j, j not i's own      negative: x_label_i != y_label_j
//
// A loss is a program over one row (pairwise/losses.h): folds over its pairs, a value, a gradient per pair. What runs a
// program is a Row: pairwise_cpu.cpp walks it with vectors, pairwise_cuda.cu with a block of threads. programs.h lists
// the programs.
#pragma once

#include "common/isa.h"
#include "rows/rows.h"

namespace tilewise {

constexpr int kPairParameters = 4;

// How the pairs of a chunk of rows are related. Column j is row i's own when j = i + self_offset.
template <typename T>
struct Relations {
  const int64_t* x_labels = nullptr;  // (rows,)
  const int64_t* y_labels = nullptr;  // (columns,)
  // On a GPU: y_labels in 32 bits, from a multiple of 16 bytes on, and whether one of them takes more. Null: not
  // formed.
  const int32_t* short_labels = nullptr;  // (columns,)
  const int32_t* too_long = nullptr;
  int64_t self_offset = 0;
  bool excludes_self = false;
  // A negative whose guide similarity exceeds that of the row's first positive less the margin is no negative.
  const T* guide = nullptr;  // (rows, columns)
  int64_t guide_stride = 0;
  T guide_margin = 0;
};

template <typename T>
struct PairwiseChunk {
  T* similarities = nullptr;  // (rows, columns)
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;
  Relations<T> relations;
  int program = -1;  // its place among the PairPrograms
  T parameters[kPairParameters] = {};
  const T* scale = nullptr;  // z = scale s + bias
  const T* bias = nullptr;   // null: 0
  T* loss_rows = nullptr;    // (rows,)
  T* active_rows = nullptr;  // (rows,) 1 where the row has the pairs that its loss needs, else 0
  // G = upstream dL/dz, where wanted; its matrix may be the similarities themselves.
  bool wants_gradient = false;
  Dtype gradient_dtype = Dtype::kFloat32;
  void* gradient = nullptr;  // (rows, columns), rows as far apart as those of the similarities
  Upstream<T> upstream;
  T* bias_rows = nullptr;  // (rows,) sums of G over columns
};

struct PairwiseKernels {
  void (*run_float)(const PairwiseChunk<float>&, int64_t begin, int64_t end);  // rows [begin, end)
  void (*run_double)(const PairwiseChunk<double>&, int64_t begin, int64_t end);
};
TILEWISE_DECLARE_KERNELS(PairwiseKernels, pairwise_kernels)

// The low 32 bits of labels; too_long, which is 0, becomes 1 where that is not the label.
struct ShortLabels {
  const int64_t* labels = nullptr;  // (columns,)
  int64_t columns = 0;
  int32_t* shorts = nullptr;  // (columns,)
  int32_t* too_long = nullptr;
};

// A CUDA error string, or null.
const char* short_labels_cuda(const ShortLabels& op, void* stream);
const char* pairwise_cuda(const PairwiseChunk<float>& chunk, void* stream);
const char* pairwise_reduction_cuda(const RowReduction<float>& reduction, void* stream);

}  // namespace tilewise
