// Cross entropy over rows of logits, PyTorch's semantics extended. With c_k the target coefficients
// (class index y: (1-eps) w_y 1[k=y] + eps/V w_k; probabilities t: w_k ((1-eps) t_k + eps/V)), W = sum c_k:
//
//   loss_n = row_weight_n (sum_k c_k (lse - x_k) + lam lse^2)
//   dx_k   = p_k (g (W + 2 lam lse) + g_lse - g_H H - g_H d_k) - g c_k,   d_k = log p_k
//
// The two structs below are the whole operator; the row engine does the passes on CPU and CUDA.
#pragma once

#include "common/isa.h"
#include "rows/rows.h"

namespace tilewise {

template <typename T>
struct CrossEntropyForward {
  RowMatrix logits;
  SoftmaxRequest<T> request;
  const int64_t* target = nullptr;  // (rows,), null for probability targets
  const T* row_weight = nullptr;    // (rows,) or null
  int64_t ignore_index = -100;
  T confidence = 1;  // 1 - label_smoothing
  T lse_square_scale = 0;
  T* loss_rows = nullptr;   // (rows,)
  T* share_rows = nullptr;  // (rows,) what the row adds to the denominator of the mean
  T* row_state = nullptr;   // (3, all rows): max, log_sum, W
  int64_t all_rows = 0;     // of the problem whose rows these are; 0: there are no others
  T* lse = nullptr;         // (rows,) with request.details
  T* entropy = nullptr;
  int64_t* argmax = nullptr;
  RowParts parts;
};

template <typename T>
struct CrossEntropyBackward {
  RowMatrix logits;
  RowMatrix gradient;
  Transform<T> transform;
  DenseTarget<T> dense;
  const int64_t* target = nullptr;
  int64_t ignore_index = -100;
  T confidence = 1;
  T lse_square_scale = 0;
  Upstream<T> upstream;
  const T* grad_lse = nullptr;  // (rows,) with a stride, or null
  int64_t grad_lse_stride = 0;
  const T* grad_entropy = nullptr;
  int64_t grad_entropy_stride = 0;
  const T* entropy = nullptr;  // (rows,), read only with grad_entropy
  const T* row_state = nullptr;
  int64_t all_rows = 0;
  int64_t first_class = 0;  // the class of the first column; the dense target is that of these columns
};

template <typename Op>
TILEWISE_FN bool is_ignored(const Op& op, int64_t row) {
  return op.target != nullptr && op.target[row] == op.ignore_index;
}

TILEWISE_FN bool is_outside(int64_t index, int64_t classes) { return index < 0 || index >= classes; }

template <typename Op>
TILEWISE_FN int64_t state_stride(const Op& op) {
  return op.all_rows != 0 ? op.all_rows : op.logits.rows;
}

template <typename T>
TILEWISE_FN void write_row(const CrossEntropyForward<T>& op, int64_t row, T loss, T share, T max, T log_sum,
                           T weight_sum) {
  op.loss_rows[row] = loss;
  op.share_rows[row] = share;
  op.row_state[row] = max;
  op.row_state[state_stride(op) + row] = log_sum;
  op.row_state[2 * state_stride(op) + row] = weight_sum;
}

template <typename T>
TILEWISE_FN bool skip_row(const CrossEntropyForward<T>& op, int64_t row, bool writes) {
  if (op.request.details || !is_ignored(op, row)) return false;
  if (writes) write_row(op, row, T(0), T(0), T(0), T(0), T(0));
  return true;
}

template <typename T>
TILEWISE_FN void finish_row(const CrossEntropyForward<T>& op, int64_t row, const SoftmaxStats<T>& stats) {
  const T log_sum = tilewise::log_sum(stats);
  const T lse = stats.max + log_sum;
  if (op.request.details) {
    op.lse[row] = lse;
    op.entropy[row] = log_sum - stats.exp_dot / (T(1) + stats.sum);
    op.argmax[row] = stats.argmax;
  }
  if (is_ignored(op, row)) {
    write_row(op, row, T(0), T(0), stats.max, log_sum, T(0));
    return;
  }
  T weight_sum = stats.weight_sum;
  T weighted_dot = stats.weighted_dot;
  T share = T(1);
  if (op.target != nullptr) {
    const bool inside = !is_outside(op.target[row], op.logits.columns);
    const int64_t y = inside ? op.target[row] : 0;
    // A class that does not exist counts as 1: were it 0, a batch of such rows alone would look empty, its mean be 0.
    share = op.request.dense.weight != nullptr && inside ? op.request.dense.weight[y] : T(1);
    const T coefficient = inside ? op.confidence * share : quiet_nan<T>();
    const T x = apply(op.request.transform, read_element<T>(op.logits, row, y));
    weight_sum += coefficient;
    if (coefficient != T(0)) weighted_dot += coefficient * (x - stats.max);
  }
  const T row_weight = op.row_weight != nullptr ? op.row_weight[row] : T(1);
  const T square = op.lse_square_scale != T(0) ? op.lse_square_scale * lse * lse : T(0);
  const T fit = weight_sum != T(0) ? log_sum * weight_sum - weighted_dot : T(0);
  write_row(op, row, row_weight * (fit + square), share, stats.max, log_sum, weight_sum);
}

template <typename T>
TILEWISE_FN RowGradient<T> gradient_of_row(const CrossEntropyBackward<T>& op, int64_t row) {
  RowGradient<T> result;
  result.max = op.row_state[row];
  result.log_sum = op.row_state[state_stride(op) + row];
  const T weight_sum = op.row_state[2 * state_stride(op) + row];
  const T g = is_ignored(op, row) ? T(0) : upstream_of_row(op.upstream, row);
  const T g_lse = op.grad_lse != nullptr ? op.grad_lse[row * op.grad_lse_stride] : T(0);
  const T g_entropy = op.grad_entropy != nullptr ? op.grad_entropy[row * op.grad_entropy_stride] : T(0);
  result.zero = g == T(0) && g_lse == T(0) && g_entropy == T(0);
  if (result.zero) return result;
  result.alpha = g_lse;
  if (g != T(0)) result.alpha += g * (weight_sum + T(2) * op.lse_square_scale * (result.max + result.log_sum));
  if (g_entropy != T(0)) result.alpha -= g_entropy * op.entropy[row];
  result.beta = -g_entropy;
  result.dense = g;
  if (op.target != nullptr && g != T(0)) {
    const int64_t y = op.target[row] - op.first_class;
    if (is_outside(y, op.logits.columns)) return result;
    result.target = y;
    result.gamma = -g * (op.confidence * (op.dense.weight != nullptr ? op.dense.weight[y] : T(1)));
  }
  return result;
}

// Launchers. The CPU ones process rows [begin, end); the caller splits them over threads.
template <typename T>
struct CrossEntropyKernels {
  void (*forward)(const CrossEntropyForward<T>&, int64_t begin, int64_t end);
  void (*backward)(const CrossEntropyBackward<T>&, int64_t begin, int64_t end);
};
TILEWISE_DECLARE_KERNELS(ForTypes<CrossEntropyKernels>, cross_entropy_kernels)

// They return a CUDA error string, or null. Only float statistics: float64 matrices stay on the CPU.
const char* cross_entropy_forward_cuda(const CrossEntropyForward<float>& op, void* stream);
const char* cross_entropy_reduction_cuda(const RowReduction<float>& reduction, void* stream);
const char* cross_entropy_backward_cuda(const CrossEntropyBackward<float>& op, void* stream);

}  // namespace tilewise
