// The row engine: losses whose statistics come from one streaming pass over each row of a matrix and whose
// gradient is one expression per element. rows_cpu.h and rows.cuh run the passes; an operator is a small
// struct with three functions (see cross_entropy/cross_entropy.h and z_loss/z_loss.h):
//
//   bool skip_row(op, row, writes)          the row needs no pass: one thread of it writes its outputs here
//   void finish_row(op, row, statistics)    statistics of the row -> its loss and saved state
//   RowGradient gradient_of_row(op, row)    saved state and upstream gradient -> coefficients
//
// T is the type of statistics and coefficients: double for float64 matrices, float for all others.
#pragma once

#include <algorithm>

#include "common/online_softmax.h"

namespace tilewise {

// A (rows, columns) matrix anywhere in memory, strides in elements.
struct RowMatrix {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

// On a GPU, few long rows are read by several blocks each: a row by `count`, whose statistics meet in `memory`.
struct RowParts {
  int64_t count = 1;
  void* memory = nullptr;
};
constexpr int64_t kPartBytes = 32;  // of the statistics of a part

// So many that the blocks fill a large GPU, each with work for several microseconds; a warp merges them.
inline int64_t row_parts(int64_t rows, int64_t columns) {
  constexpr int64_t kBlocks = 528, kColumns = 4096, kMost = 32;
  return std::max<int64_t>(1, std::min({kBlocks / std::max<int64_t>(1, rows), columns / kColumns, kMost}));
}

// Reads one element; for the few per-row gathers. Tiles are read by the engines, which know the type.
template <typename T>
TILEWISE_FN T read_element(const RowMatrix& matrix, int64_t row, int64_t column) {
  const int64_t offset = row * matrix.row_stride + column * matrix.column_stride;
  switch (matrix.dtype) {
    case Dtype::kFloat64:
      return static_cast<T>(static_cast<const double*>(matrix.data)[offset]);
    case Dtype::kFloat32:
      return static_cast<T>(static_cast<const float*>(matrix.data)[offset]);
    case Dtype::kBFloat16:
      return static_cast<T>(to_float(static_cast<const BFloat16*>(matrix.data)[offset]));
    default:
      return static_cast<T>(to_float(static_cast<const Float16*>(matrix.data)[offset]));
  }
}

// Effective logit: scale * raw, then softcap * tanh(. / softcap) when softcap > 0.
template <typename T>
struct Transform {
  T scale = 1;
  T softcap = 0;
};

template <typename T>
TILEWISE_FN bool is_identity(const Transform<T>& transform) {
  return transform.scale == T(1) && transform.softcap == T(0);
}

template <typename T>
TILEWISE_FN T apply(const Transform<T>& transform, T raw) {
  const T x = transform.scale * raw;
  return transform.softcap > T(0) ? transform.softcap * fast_tanh(fast_divide(x, transform.softcap)) : x;
}

// d apply / d raw, from the effective logit
template <typename T>
TILEWISE_FN T slope(const Transform<T>& transform, T effective) {
  if (transform.softcap == T(0)) return transform.scale;
  const T t = fast_divide(effective, transform.softcap);
  return transform.scale * (T(1) - t) * (T(1) + t);
}

// The dense part of the target coefficients of a row:  c_k = w_k (uniform + soft * t_k).
// weight is (columns,) or null for ones; probabilities is read only when soft != 0.
template <typename T>
struct DenseTarget {
  T uniform = 0;
  T soft = 0;
  const T* weight = nullptr;
  RowMatrix probabilities;
};

template <typename T>
TILEWISE_FN bool is_empty(const DenseTarget<T>& dense) {
  return dense.uniform == T(0) && dense.soft == T(0);
}

// What the softmax pass gathers beyond max and sum.
template <typename T>
struct SoftmaxRequest {
  Transform<T> transform;
  DenseTarget<T> dense;  // -> weight_sum, weighted_dot
  bool details = false;  // -> exp_dot, argmax
};

// With d_k = x_k - max - log_sum and p_k = e^(d_k), the gradient of a row with respect to x is
//   dx_k = p_k (alpha + beta d_k) + lambda rate (x_k - mean) + kappa - g c_k + gamma 1[k = target]
// p is formed when kSoftmax, the affine part when not: no operator needs both. Its slope is two factors, for of large
// logits it is too small a number.
template <typename T>
struct RowGradient {
  T max = 0;
  T log_sum = 0;
  T alpha = 0;
  T beta = 0;
  T mean = 0;
  T lambda = 0;
  T rate = 0;
  T kappa = 0;
  T dense = 0;  // g, the factor of c_k
  T gamma = 0;
  int64_t target = -1;  // -1: no target column
  bool zero = false;    // the whole row is zero; the matrix is not read
};

// p (alpha + beta d) - c at a logit. Of a confident row alpha and c cancel but for 1 - p, which is not left to the
// rounding of p.
template <typename T>
TILEWISE_FN T softmax_gradient(const RowGradient<T>& row, T x, T c) {
  const T log_p = (x - row.max) - row.log_sum;
  const T d = log_p < ExpFloor<T>::value ? ExpFloor<T>::value : log_p;
  T p_minus_1;
  const T p = fast_exp(d, p_minus_1);
  return p * ((row.alpha - c) + row.beta * d) + c * p_minus_1;
}

enum class Reduction : int32_t { kNone, kMean, kSum };

// Gradient of the reduced loss with respect to row `row`'s loss: upstream has stride 0 when it is one value.
template <typename T>
struct Upstream {
  const T* grad_loss = nullptr;  // null: no gradient arrives through the loss
  int64_t stride = 0;
  const T* row_weight = nullptr;
  const T* total = nullptr;
  bool mean = false;
  T divisor = 1;  // a mean over a number known beforehand
};

template <typename T>
TILEWISE_FN T upstream_of_row(const Upstream<T>& upstream, int64_t row) {
  if (upstream.grad_loss == nullptr) return T(0);
  T g = upstream.grad_loss[row * upstream.stride];
  if (upstream.row_weight != nullptr) g *= upstream.row_weight[row];
  if (!upstream.mean) return upstream.divisor == T(1) ? g : g / upstream.divisor;
  return *upstream.total == T(0) ? T(0) : g / *upstream.total;
}

// The last step of every forward: rows -> reduced loss and its denominator.
//   total = sum share_n;  loss = sum loss_n (/ total when mean; 0 when total is 0)
template <typename T>
struct RowReduction {
  int64_t rows = 0;
  const T* loss_rows = nullptr;
  const T* share_rows = nullptr;
  Reduction reduction = Reduction::kNone;
  T* loss = nullptr;  // not written with kNone: loss_rows is the result
  T* total = nullptr;
  T divisor = 1;  // of the sum with kSum
};

}  // namespace tilewise
