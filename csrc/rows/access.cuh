// What both passes of the CUDA row engine share: a row read as vectors or elements, cut at 16-byte boundaries, the
// dense target coefficients that lie beside it, and the exponential.
#pragma once

#include "common/vector.cuh"
#include "rows/rows.h"

namespace tilewise {

inline constexpr int kMostThreads = 256;  // of a block

// e^(x - max) as 2^(x log2e - reference), one fused instruction. The reference is max log2e rounded, which is off by
// up to 2^-11 at max = 1e4; correction() is exactly that error, applied once per row instead of once per element.
__device__ __forceinline__ float correction(float max, float reference) {
  return fast_exp2(-fmaf(max, kLog2E, -reference));
}

// One row of a matrix as it is read: as vectors if the first whole run is aligned (then all are).
template <typename Storage>
struct RowReader {
  const Storage* data;
  int64_t stride;
  bool vectors;

  __device__ RowReader(const void* base, int64_t offset, int64_t column_stride, int64_t first_run)
      : data(static_cast<const Storage*>(base) + offset),
        stride(column_stride),
        vectors(column_stride == 1 && is_vector_aligned(data + first_run)) {}
  __device__ RowReader(const RowMatrix& matrix, int64_t row, int64_t first_run)
      : RowReader(matrix.data, row * matrix.row_stride, matrix.column_stride, first_run) {}

  template <bool kLastUse, int kCount>
  __device__ __forceinline__ Run<Storage, kCount> read(int64_t column) const {
    if constexpr (kCount > 1) {
      if (vectors) return load_vectors<kLastUse, kCount>(data + column);
    }
    Run<Storage, kCount> run;
#pragma unroll
    for (int i = 0; i < kCount; ++i) run.value[i] = data[(column + i) * stride];
    return run;
  }
};

// Whole vectors are columns [head, body_end).
struct RowCut {
  int64_t head;
  int64_t body_end;
  int64_t scalars;

  template <typename Storage>
  static __device__ __forceinline__ RowCut of(const RowMatrix& matrix, int64_t row) {
    if (matrix.column_stride != 1) return {matrix.columns, matrix.columns, matrix.columns};
    const uintptr_t address = reinterpret_cast<uintptr_t>(static_cast<Storage*>(matrix.data) + row * matrix.row_stride);
    const int64_t to_boundary = static_cast<int64_t>((16 - address % 16) % 16 / sizeof(Storage));
    const int64_t head = to_boundary < matrix.columns ? to_boundary : matrix.columns;
    const int64_t body = (matrix.columns - head) / kVector<Storage> * kVector<Storage>;
    return {head, head + body, matrix.columns - body};
  }

  // Column of the i-th element outside the body.
  __device__ int64_t scalar_column(int64_t i) const { return i < head ? i : i - head + body_end; }
};

// The dense target coefficients c_k of a row; Probability is void where there are no probabilities. Probabilities are
// fetched ahead with the logits; weights, shared by all rows and so in the caches, when they are used.
template <typename Probability>
struct DenseRow {
  using Stored = std::conditional_t<std::is_void_v<Probability>, float, Probability>;
  static constexpr bool kProbabilities = !std::is_void_v<Probability>;

  float uniform;
  float soft;
  bool active;
  bool weighted;
  RowReader<Stored> probability;
  RowReader<float> weight;

  __device__ DenseRow(const DenseTarget<float>& dense, int64_t row, int64_t first_run)
      : uniform(dense.uniform),
        soft(dense.soft),
        active(!is_empty(dense)),
        weighted(dense.weight != nullptr),
        probability(dense.probabilities, row, first_run),
        weight(dense.weight, 0, 1, first_run) {}

  template <int kCount>
  __device__ __forceinline__ Run<Stored, kCount> fetch(int64_t column) const {
    if constexpr (kProbabilities) return probability.template read<true, kCount>(column);
    return {};
  }

  template <int kCount>
  __device__ __forceinline__ void coefficients(const Run<Stored, kCount>& fetched, int64_t column,
                                               float (&c)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) c[i] = kProbabilities ? uniform + soft * to_float(fetched.value[i]) : uniform;
    if (!weighted) return;
    const Run<float, kCount> w = weight.template read<false, kCount>(column);
#pragma unroll
    for (int i = 0; i < kCount; ++i) c[i] *= w.value[i];
  }
};

// What passes and formulas inherit that read nothing beside the logits.
struct NoSide {
  template <int kCount>
  struct Side {};

  template <int kCount>
  __device__ __forceinline__ Side<kCount> fetch(int64_t) const {
    return {};
  }
};

}  // namespace tilewise
