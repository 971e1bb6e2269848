// What the binding files of row operators share: views, upstream gradients, the reduction, the row loop.
#pragma once

#include "common/checks.h"
#include "rows/rows.h"

namespace tilewise {

inline RowMatrix row_matrix(const Tensor& tensor, const char* op, const char* name) {
  require(tensor.dim() == 2, op, "expected ", name, " to be 2-D, got shape ", shape_of(tensor));
  const std::optional<Dtype> dtype = storage_of(tensor);
  require(dtype.has_value(), op, "expected ", name, " to be float64, float32, bfloat16 or float16, got ",
          toString(tensor.scalar_type()));
  RowMatrix matrix;
  matrix.dtype = *dtype;
  matrix.data = tensor.data_ptr();
  matrix.rows = tensor.size(0);
  matrix.columns = tensor.size(1);
  matrix.row_stride = tensor.stride(0);
  matrix.column_stride = tensor.stride(1);
  return matrix;
}

// Logits have at least one class, and on a GPU no float64 (its statistics would run at 1/64 of the rate).
inline RowMatrix logits_matrix(const Tensor& logits, const char* op) {
  const RowMatrix matrix = row_matrix(logits, op, "logits");
  require(matrix.columns >= 1, op, "expected logits to have at least one class, got shape ", shape_of(logits));
  require(!kOnGpu || matrix.dtype != Dtype::kFloat64, op,
          "expected logits to be float32, bfloat16 or float16 on a GPU, got Double");
  return matrix;
}

// Whether elements share memory, as those of expanded dimensions do.
inline bool overlaps(const RowMatrix& m) {
  const bool by_rows =
      (m.columns <= 1 || m.column_stride >= 1) && (m.rows <= 1 || m.row_stride > (m.columns - 1) * m.column_stride);
  const bool by_columns =
      (m.rows <= 1 || m.row_stride >= 1) && (m.columns <= 1 || m.column_stride > (m.rows - 1) * m.row_stride);
  return !by_rows && !by_columns;
}

inline Reduction parse_reduction(const std::string& reduction, const char* op) {
  if (reduction == "none") return Reduction::kNone;
  if (reduction == "mean") return Reduction::kMean;
  require(reduction == "sum", op, "expected reduction to be 'none', 'mean' or 'sum', got '", reduction, "'");
  return Reduction::kSum;
}

// Class indices; on the CPU each must be a class or ignore_index. On a GPU the kernels give NaN instead: looking
// would mean waiting for the device.
inline const int64_t* class_indices(const Tensor& target, const RowMatrix& logits, int64_t ignore_index,
                                    const char* op) {
  const int64_t* indices = dense<int64_t>(target, {logits.rows}, ScalarType::Long, op, "target");
  for (int64_t i = 0; !kOnGpu && i < logits.rows; ++i) {
    const bool valid = (indices[i] >= 0 && indices[i] < logits.columns) || indices[i] == ignore_index;
    require(valid, op, "expected target[", i, "] in [0, ", logits.columns, ") or ignore_index (", ignore_index,
            "), got ", indices[i]);
  }
  return indices;
}

template <typename T>
Upstream<T> upstream_of(const std::optional<Tensor>& grad_loss, const Tensor& logits, const T* row_weight,
                        const T* total, Reduction reduction, const char* op) {
  Upstream<T> upstream;
  upstream.row_weight = row_weight;
  upstream.total = total;
  upstream.mean = reduction == Reduction::kMean;
  if (!grad_loss.has_value()) return upstream;
  require_dtype(*grad_loss, statistics_type(logits), op, "grad_loss");
  if (reduction == Reduction::kNone) {
    require_shape(*grad_loss, {logits.size(0)}, op, "grad_loss");
    upstream.stride = grad_loss->stride(0);
  } else {
    require_shape(*grad_loss, {}, op, "grad_loss");
  }
  upstream.grad_loss = static_cast<const T*>(grad_loss->data_ptr());
  return upstream;
}

// What a backward reads of its forward: `per_row` numbers of every row, line by line, and then the total.
inline std::vector<int64_t> state_shape(const Tensor& like, int64_t per_row) {
  if (per_row == 0) return {};
  return {per_row * like.size(0) + 1};
}

template <typename T>
const T* state_of(const Tensor& state, const Tensor& like, int64_t per_row, const char* op) {
  return dense<T>(state, state_shape(like, per_row), statistics_type(like), op, "state");
}

// What one forward writes: the loss and the state. What each row adds to loss and total is freed with this.
class LossOutputs {
 public:
  Tensor loss, state;

  LossOutputs(const Tensor& like, Reduction reduction, int64_t state_per_row)
      : loss(new_output(like, reduction == Reduction::kNone ? std::vector{like.size(0)} : std::vector<int64_t>{},
                        statistics_type(like))),
        state(new_output(like, state_shape(like, state_per_row), statistics_type(like))),
        reduction_(reduction),
        rows_(like.size(0)),
        scratch_(new_output(like, {reduction == Reduction::kNone ? rows_ : 2 * rows_}, statistics_type(like))) {}

  template <typename T>
  T* row_state() const {
    return static_cast<T*>(state.data_ptr());
  }
  template <typename T>
  T* share_rows() const {
    return static_cast<T*>(scratch_.data_ptr());
  }
  template <typename T>
  T* loss_rows() const {
    return reduction_ == Reduction::kNone ? static_cast<T*>(loss.data_ptr()) : share_rows<T>() + rows_;
  }

  template <typename T>
  RowReduction<T> reduction() const {
    return {.rows = rows_,
            .loss_rows = loss_rows<T>(),
            .share_rows = share_rows<T>(),
            .reduction = reduction_,
            .loss = static_cast<T*>(loss.data_ptr()),
            .total = row_state<T>() + state.numel() - 1};
  }

 private:
  Reduction reduction_;
  int64_t rows_;
  Tensor scratch_;
};

// Sums in double and in row order, whatever the number of threads.
template <typename T>
void reduce_rows(const RowReduction<T>& reduction) {
  double loss = 0;
  double total = 0;
  for (int64_t i = 0; i < reduction.rows; ++i) {
    loss += reduction.loss_rows[i];
    total += reduction.share_rows[i];
  }
  *reduction.total = static_cast<T>(total);
  if (reduction.reduction == Reduction::kSum) *reduction.loss = static_cast<T>(loss / reduction.divisor);
  if (reduction.reduction == Reduction::kMean) *reduction.loss = static_cast<T>(total == 0 ? 0 : loss / total);
}

// Launches a pass over rows, with memory for the parts of few long ones.
template <typename Op, typename Launch>
void launch_rows(Op op, const Tensor& like, const char* name, Launch launch) {
  op.parts.count = row_parts(op.logits.rows, op.logits.columns);
  std::optional<Tensor> memory;
  if (op.parts.count > 1) {
    memory = new_output(like, {op.logits.rows * op.parts.count * kPartBytes}, ScalarType::Byte);
    op.parts.memory = memory->data_ptr();
  }
  require_launched(launch(op, current_stream(like)), name);
}

// Rows over torch's threads, in shares of at least 32 Ki elements.
template <typename Op>
void for_rows(const Op& op, void (*kernel)(const Op&, int64_t, int64_t)) {
  const int64_t grain = 1 + 32768 / op.logits.columns;
  torch::stable::parallel_for(0, op.logits.rows, grain, [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
}

}  // namespace tilewise
