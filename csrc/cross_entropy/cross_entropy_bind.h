// What the bindings of cross_entropy and linear_cross_entropy share: options, targets, launches.
#pragma once

#include "cross_entropy/cross_entropy.h"
#include "rows/rows_bind.h"

namespace tilewise {

constexpr int64_t kStatePerRow = 3;

struct CrossEntropyOptions {
  int64_t ignore_index;
  double label_smoothing;
  double lse_square_scale;
  std::optional<double> softcap;
  double logit_scale;
  Reduction reduction;
};

// Those who call torch.ops directly have passed no Python check.
inline CrossEntropyOptions checked_options(int64_t ignore_index, double label_smoothing, double lse_square_scale,
                                           std::optional<double> softcap, double logit_scale,
                                           const std::string& reduction, const char* op) {
  require(label_smoothing >= 0 && label_smoothing <= 1, op, "expected label_smoothing in [0, 1], got ",
          label_smoothing);
  require(!softcap.has_value() || *softcap > 0, op, "expected softcap above 0, got ", softcap.value_or(0));
  return {ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, parse_reduction(reduction, op)};
}

template <typename T>
Transform<T> transform_of(const CrossEntropyOptions& options) {
  return {static_cast<T>(options.logit_scale), static_cast<T>(options.softcap.value_or(0))};
}

inline bool is_class_index(const Tensor& target) { return target.scalar_type() == ScalarType::Long; }

// c_k outside the target column: eps/V w_k for class indices, w_k ((1-eps) t_k + eps/V) for probabilities. `like` has
// the device and the dtype of the logits, `logits` their shape.
template <typename T>
DenseTarget<T> dense_target(const Tensor& like, const RowMatrix& logits, const Tensor& target,
                            const std::optional<Tensor>& weight, const CrossEntropyOptions& options, const char* op) {
  DenseTarget<T> dense;
  dense.weight = tilewise::dense<T>(weight, {logits.columns}, statistics_type(like), op, "weight");
  dense.uniform = static_cast<T>(options.label_smoothing / static_cast<double>(logits.columns));
  if (is_class_index(target)) return dense;
  dense.soft = static_cast<T>(1 - options.label_smoothing);
  require_shape(target, {logits.rows, logits.columns}, op, "target");
  require(target.scalar_type() == like.scalar_type() || target.scalar_type() == ScalarType::Float, op,
          "expected a probability target to have dtype ", toString(like.scalar_type()), " or Float, got ",
          toString(target.scalar_type()));
  dense.probabilities = row_matrix(target, op, "target");
  return dense;
}

template <typename T>
void run(const CrossEntropyForward<T>& op, const Tensor& like, const char* name) {
  if constexpr (kOnGpu) {
    launch_rows(op, like, name, cross_entropy_forward_cuda);
  } else {
    for_rows(op, selected_cross_entropy_kernels().of<T>().forward);
  }
}

template <typename T>
void run(const CrossEntropyBackward<T>& op, const Tensor& like, const char* name) {
  if constexpr (kOnGpu) {
    require_launched(cross_entropy_backward_cuda(op, current_stream(like)), name);
  } else {
    for_rows(op, selected_cross_entropy_kernels().of<T>().backward);
  }
}

template <typename T>
void run(const RowReduction<T>& reduction, const Tensor& like, const char* name) {
  if constexpr (kOnGpu) {
    require_launched(cross_entropy_reduction_cuda(reduction, current_stream(like)), name);
  } else {
    reduce_rows(reduction);
  }
}

}  // namespace tilewise
