// Matrix products and the views they take (host only): by the BLAS that torch uses on the device, and on the CPU, where
// the factors are float32 or float64 and need no packing, by gemm_tile.h.
#pragma once

#include <algorithm>

#include "common/accumulate.h"
#include "common/checks.h"

#if defined(TILEWISE_CUDA)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common/gemm_tile.h"
#endif

namespace tilewise {

#if !defined(TILEWISE_CUDA)

template <typename T>
void multiply(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta) {
  Product<T> product{.rows = out.size(0), .columns = out.size(1), .depth = a.size(1)};
  product.a = static_cast<const T*>(a.data_ptr());
  product.a_row = a.stride(0);
  product.a_depth = a.stride(1);
  product.b = static_cast<const T*>(b.data_ptr());
  product.b_depth = b.stride(0);
  product.c = static_cast<T*>(out.data_ptr());
  product.c_row = out.stride(0);
  product.c_column = out.stride(1);
  if (beta != 0) {
    product.start = static_cast<const T*>(self.data_ptr());
    product.start_row = self.size(0) == 1 ? 0 : self.stride(0);
    product.start_column = self.size(1) == 1 ? 0 : self.stride(1);
  }
  const int64_t unit = 2 * kUnitRows * kUnitColumns * std::max<int64_t>(1, product.depth);
  const auto kernel = selected_gemm_kernels().of<T>().multiply;
  torch::stable::parallel_for(0, units_of(product), std::max<int64_t>(1, (int64_t{1} << 20) / unit),
                              [&](int64_t begin, int64_t end) { kernel(product, begin, end); });
}

#endif

// Whether gemm_tile.h multiplies: it reads the columns of b side by side.
inline bool wants_unit_columns(ScalarType dtype) {
  return !kOnGpu && (dtype == ScalarType::Float || dtype == ScalarType::Double);
}

// out = beta self + a b, beta 0 or 1. With 0 self is not read; out may be self, and a self of one row or one column is
// repeated.
inline void add_product(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta) {
#if defined(TILEWISE_CUDA)
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, 1.0));
#else
  if (wants_unit_columns(out.scalar_type()) && (b.stride(1) == 1 || b.size(1) == 1))
    return with_statistics(out, [&](auto zero) { multiply<decltype(zero)>(out, self, a, b, beta); });
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

// Blocks a b^T of matrices whose rows are vectors of one length, such as logits and similarities. gemm_tile.h wants one
// factor transposed: it is the smaller, of up to min(rows, columns) vectors.
class RowProducts {
 public:
  RowProducts(const Tensor& like, int64_t rows, int64_t columns) {
    if (!wants_unit_columns(like.scalar_type())) return;
    packed_ = new_output(like, {like.size(1), std::min(rows, columns)}, like.scalar_type());
  }

  // out = a b^T, plus start (columns,) in every row. On a GPU out may be float32 where the factors have 16 bits.
  void form(const Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& start = {}) const {
#if defined(TILEWISE_CUDA)
    if (a.scalar_type() != out.scalar_type()) {
      STABLE_TORCH_ERROR_CODE_CHECK(
          aoti_torch_cuda_mm_dtype_out(out.get(), a.get(), transposed(b).get(), aoti_torch_dtype_float32()));
      return;
    }
#endif
    const Tensor first = start.has_value() ? torch::stable::unsqueeze(*start, 0) : out;
    const double beta = start.has_value() ? 1.0 : 0.0;
    if (!packed_.has_value()) return add_product(out, first, a, transposed(b), beta);
    if (out.size(0) <= out.size(1)) return add_product(transposed(out), transposed(first), b, packed(a), beta);
    add_product(out, first, a, packed(b), beta);
  }

 private:
  Tensor packed(const Tensor& matrix) const {
    Tensor result = columns_of(*packed_, 0, matrix.size(0));
    torch::stable::copy_(result, transposed(matrix));
    return result;
  }

  std::optional<Tensor> packed_;
};

// out = the sum of products a b, one a call; that of 16-bit products is kept in float32, where there are several.
class ProductSum {
 public:
  explicit ProductSum(const Tensor& out)
      : out_(out), rounded_(out.scalar_type() != ScalarType::Float && out.scalar_type() != ScalarType::Double) {}

  void add(const Tensor& a, const Tensor& b, bool first, bool last) {
    if (!rounded_ || (first && last)) return add_product(out_, out_, a, b, first ? 0.0 : 1.0);
    if (first) {
      part_ = new_output(out_, {out_.size(0), out_.size(1)}, out_.scalar_type());
      sum_ = new_output(out_, {out_.size(0), out_.size(1)}, ScalarType::Float);
    }
    add_product(*part_, *part_, a, b, 0.0);
    accumulate({.dtype = *storage_of(out_),
                .part = part_->data_ptr(),
                .sum = static_cast<float*>(sum_->data_ptr()),
                .out = out_.data_ptr(),
                .count = out_.numel(),
                .first = first,
                .last = last});
  }

 private:
  void accumulate(const Accumulation& op) const {
    if constexpr (kOnGpu) {
      require_launched(accumulate_cuda(op, current_stream(out_)), "accumulate");
    } else {
      torch::stable::parallel_for(0, op.count, 32768, [&](int64_t begin, int64_t end) {
        selected_accumulate_kernels().accumulate(op, begin, end);
      });
    }
  }

  Tensor out_;
  bool rounded_;
  std::optional<Tensor> part_, sum_;
};

}  // namespace tilewise
