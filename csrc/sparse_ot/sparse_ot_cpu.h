// What the CPU kernels of sparse_ot offer to their binding, and the memory they ask for.
#pragma once

#include "simplex_topk/simplex_topk.h"
#include "sparse_ot/sparse_ot.h"
#include "transport/parallel.h"

namespace tilewise {

// Columns are shared by as many workers, each with scratch of its own.
constexpr int64_t kWorkers = 16;

template <typename T>
constexpr int64_t kWide = sizeof(int64_t) / sizeof(T);  // elements that an index takes

template <typename T>
int64_t worker_elements(const SparseColumns<T>& call) {
  return (2 + kWide<T>)*simplex_elements(call.rows);
}

template <typename T>
int64_t columns_elements(const SparseColumns<T>& call, int64_t workers) {
  return workers * worker_elements(call) + (kWide<T> + 1) * padded(call.columns);
}

template <typename T>
int64_t solve_elements(const SparseOtCall<T>& call, int64_t workers) {
  const int64_t vectors = call.method == SparseMethod::kAdam ? 4 : Lbfgs<T>::kVectors;
  return columns_elements(call.columns, workers) + vectors * padded(variables(call));
}

template <typename T>
struct SparseOtKernels {
  // One problem, `index` of the batch; scratch has columns_elements or solve_elements.
  void (*columns)(const SparseColumns<T>&, int64_t index, T* scratch, int64_t workers, const Parallel&);
  void (*solve)(const SparseOtCall<T>&, int64_t index, T* scratch, int64_t workers, const Parallel&);
};
TILEWISE_DECLARE_KERNELS(ForTypes<SparseOtKernels>, sparse_ot_kernels)

}  // namespace tilewise
