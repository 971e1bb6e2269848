// Matrix products by the BLAS that torch uses on the device, and the views they take (host only).
#pragma once

#include "common/checks.h"

#if defined(TILEWISE_CUDA)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#endif

namespace tilewise {

// out = beta self + a b. With beta 0 self is not read; out may be self, and self may broadcast.
inline void add_product(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta) {
#if defined(TILEWISE_CUDA)
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, 1.0));
#else
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, 1.0));
#endif
}

inline Tensor rows_of(Tensor matrix, int64_t begin, int64_t count) {
  return torch::stable::narrow(matrix, 0, begin, count);
}

inline Tensor columns_of(Tensor matrix, int64_t begin, int64_t count) {
  return torch::stable::narrow(matrix, 1, begin, count);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

}  // namespace tilewise
