// What the CPU kernels of sinkhorn offer to its binding, and the memory they ask for.
#pragma once

#include <algorithm>

#include "sinkhorn/sinkhorn.h"
#include "transport/parallel.h"

namespace tilewise {

constexpr int64_t kKeptBytes = int64_t{32} << 20;

// Rows are summed over columns in shares, whose number does not depend on the threads.
inline int64_t column_shares(int64_t rows) { return std::clamp<int64_t>(rows / 64, 1, 16); }

// Whether exp((f + g - C) / eps) is kept: beside a matrix it is one more; of points, where it takes 32 MiB at most.
template <typename T>
bool keeps_kernel(const Pairs<T>& pairs) {
  const int64_t bytes = pairs.rows * padded(pairs.columns) * static_cast<int64_t>(sizeof(T));
  return pairs.is_matrix() || bytes <= kKeptBytes;
}

// Elements that the points of a problem take: both sides with their features side by side, and squares.
template <typename T>
int64_t packed_elements(const Pairs<T>& pairs) {
  return pairs.is_matrix() ? 0 : (pairs.features + 1) * (padded(pairs.rows) + padded(pairs.columns));
}

template <typename T>
int64_t solve_elements(const SinkhornCall<T>& call) {
  const int64_t n = padded(call.pairs.rows), m = padded(call.pairs.columns);
  const int64_t kernel = keeps_kernel(call.pairs) ? call.pairs.rows * m : 0;
  return packed_elements(call.pairs) + kernel + 4 * n + (5 + column_shares(call.pairs.rows)) * m;
}

template <typename T>
int64_t apply_elements(const SinkhornApply<T>& call) {
  return packed_elements(call.pairs) + padded(call.pairs.rows) + (1 + call.weights) * padded(call.pairs.columns);
}

template <typename T>
struct SinkhornKernels {
  // One problem, `index` of the batch; scratch has solve_elements.
  void (*solve)(const SinkhornCall<T>&, int64_t index, T* scratch, const Parallel&);
  void (*apply)(const SinkhornApply<T>&, int64_t index, T* scratch, const Parallel&);
  void (*plan)(const SinkhornApply<T>&, int64_t index, T* scratch, const Parallel&);
};
TILEWISE_DECLARE_KERNELS(ForTypes<SinkhornKernels>, sinkhorn_kernels)

// Problems of at most kSmall x kSmall, as many at a time as a vector has lanes: groups [begin, end) of them.
template <typename T>
struct SmallSinkhornKernels {
  int64_t lanes;
  void (*solve)(const SinkhornCall<T>&, int64_t begin, int64_t end, const Parallel&);
  void (*unroll)(const SinkhornUnrolled<T>&, int64_t begin, int64_t end, const Parallel&);
};
TILEWISE_DECLARE_KERNELS(ForTypes<SmallSinkhornKernels>, small_sinkhorn_kernels)

}  // namespace tilewise
