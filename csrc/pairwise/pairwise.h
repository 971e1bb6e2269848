// The pairwise engine: losses over similarities s_ij = <x_i, y_j> of labelled embeddings, a chunk of rows of S at a
// time. Pairs are related by labels; a row's own column, if it has one, is left out by its index, never by its value.
//
//   positive: x_label_i = y_label_j, j not i's own      negative: x_label_i != y_label_j
//
// A loss is a program over one row (pairwise/losses.h): folds over its pairs, a value, a gradient per pair. What runs a
// program is a Row: pairwise_cpu.cpp walks it with vectors, pairwise_cuda.cu with a block of threads.
#pragma once

#include "common/isa.h"
#include "common/vexp.h"

namespace tilewise {

enum class PairLoss : int32_t {
  kSoftmax,
  kDecoupledSoftmax,
  kSigmoid,
  kMultiSimilarity,
  kBinomialDeviance,
  kLiftedStructure,
  kContrastive,
  kTriplet,
};

constexpr int kPairParameters = 4;

// How the pairs of a chunk of rows are related. Column j is row i's own when j = i + self_offset.
template <typename T>
struct Relations {
  const int64_t* x_labels = nullptr;  // (rows,)
  const int64_t* y_labels = nullptr;  // (columns,)
  int64_t self_offset = 0;
  bool excludes_self = false;
  // A negative whose guide similarity exceeds that of the row's first positive less the margin is no negative.
  const T* guide = nullptr;  // (rows, columns)
  int64_t guide_stride = 0;
  T guide_margin = 0;
};

template <typename T>
struct PairwiseChunk {
  T* similarities = nullptr;  // (rows, columns), overwritten by dL/dz where gradients are wanted
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;
  Relations<T> relations;
  PairLoss loss = PairLoss::kSoftmax;
  T parameters[kPairParameters] = {};
  const T* scale = nullptr;  // z = scale s + bias
  const T* bias = nullptr;   // null: 0
  const T* upstream = nullptr;  // (rows,) factor of the gradient; null: 1
  bool wants_gradient = false;
  T* loss_rows = nullptr;   // (rows,)
  T* active_rows = nullptr;  // (rows,) 1 where the row has the pairs that its loss needs, else 0
  T* bias_rows = nullptr;   // (rows,) sum over pairs of dL/dz; written with the gradient
};

}  // namespace tilewise
