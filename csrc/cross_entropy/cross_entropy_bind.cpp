// cross_entropy: checks, allocation and registration, compiled once for the CPU and once for CUDA.
#include "cross_entropy/cross_entropy.h"
#include "rows/rows_bind.h"

namespace tilewise {
namespace {

constexpr const char* kOp = "cross_entropy";

struct Options {
  int64_t ignore_index;
  double label_smoothing;
  double lse_square_scale;
  std::optional<double> softcap;
  double logit_scale;
  Reduction reduction;
};

// Those who call torch.ops directly have passed no Python check.
Options checked_options(int64_t ignore_index, double label_smoothing, double lse_square_scale,
                        std::optional<double> softcap, double logit_scale, const std::string& reduction) {
  require(label_smoothing >= 0 && label_smoothing <= 1, kOp, "expected label_smoothing in [0, 1], got ",
          label_smoothing);
  require(!softcap.has_value() || *softcap > 0, kOp, "expected softcap above 0, got ", softcap.value_or(0));
  return {ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, parse_reduction(reduction, kOp)};
}

template <typename T>
Transform<T> transform_of(const Options& options) {
  return {static_cast<T>(options.logit_scale), static_cast<T>(options.softcap.value_or(0))};
}

bool is_class_index(const Tensor& target) { return target.scalar_type() == ScalarType::Long; }

// c_k outside the target column: eps/V w_k for class indices, w_k ((1-eps) t_k + eps/V) for probabilities.
template <typename T>
DenseTarget<T> dense_target(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                            const Options& options) {
  DenseTarget<T> dense;
  dense.weight = vector_or_null<T>(weight, logits.size(1), logits, statistics_type(logits), kOp, "weight");
  dense.uniform = static_cast<T>(options.label_smoothing / static_cast<double>(logits.size(1)));
  if (is_class_index(target)) return dense;
  dense.soft = static_cast<T>(1 - options.label_smoothing);
  require_shape(target, {logits.size(0), logits.size(1)}, kOp, "target");
  require_same_device(target, logits, kOp, "target");
  require(target.scalar_type() == logits.scalar_type() || target.scalar_type() == ScalarType::Float, kOp,
          "expected a probability target to have dtype ", toString(logits.scalar_type()), " or Float, got ",
          toString(target.scalar_type()));
  dense.probabilities = row_matrix(target, kOp, "target");
  return dense;
}

template <typename T>
void run(const CrossEntropyForward<T>& op, const RowReduction<T>& reduction, [[maybe_unused]] const Tensor& logits) {
#if defined(TILEWISE_CUDA)
  const char* error = cross_entropy_forward_cuda(op, reduction, current_stream(logits));
  require(error == nullptr, kOp, "the CUDA kernel could not be launched: ", error);
#else
  const CrossEntropyKernels& kernels = selected_cross_entropy_kernels();
  for_rows(op, kernels.forward_float, kernels.forward_double);
  reduce_rows(reduction);
#endif
}

template <typename T>
void run(const CrossEntropyBackward<T>& op, [[maybe_unused]] const Tensor& logits) {
#if defined(TILEWISE_CUDA)
  const char* error = cross_entropy_backward_cuda(op, current_stream(logits));
  require(error == nullptr, kOp, "the CUDA kernel could not be launched: ", error);
#else
  const CrossEntropyKernels& kernels = selected_cross_entropy_kernels();
  for_rows(op, kernels.backward_float, kernels.backward_double);
#endif
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
ForwardResult forward_as(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& row_weight, const Options& options, bool return_stats) {
  const ScalarType type = statistics_type(logits);
  const int64_t n = logits.size(0);
  const int64_t n_details = return_stats ? n : 0;
  CrossEntropyForward<T> op;
  op.logits = logits_matrix(logits, kOp);
  op.request = {transform_of<T>(options), dense_target<T>(logits, target, weight, options), return_stats};
  if (is_class_index(target)) op.target = class_indices(target, logits, options.ignore_index, kOp);
  op.row_weight = vector_or_null<T>(row_weight, n, logits, type, kOp, "row_weight");
  op.ignore_index = options.ignore_index;
  op.confidence = static_cast<T>(1 - options.label_smoothing);
  op.lse_square_scale = static_cast<T>(options.lse_square_scale);

  const LossOutputs outputs(logits, options.reduction);
  const Tensor row_state = new_output(logits, {3, n}, type);
  const Tensor lse = new_output(logits, {n_details}, type);
  const Tensor entropy = new_output(logits, {n_details}, type);
  const Tensor argmax = new_output(logits, {n_details}, ScalarType::Long);
  op.loss_rows = static_cast<T*>(outputs.loss_rows.data_ptr());
  op.share_rows = static_cast<T*>(outputs.share_rows.data_ptr());
  op.row_state = static_cast<T*>(row_state.data_ptr());
  op.lse = static_cast<T*>(lse.data_ptr());
  op.entropy = static_cast<T*>(entropy.data_ptr());
  op.argmax = static_cast<int64_t*>(argmax.data_ptr());
  run(op, outputs.reduction<T>(options.reduction), logits);
  return {outputs.loss, lse, entropy, argmax, row_state, outputs.total};
}

// inplace_backward concerns autograd alone: it chooses which backward operator runs.
ForwardResult forward(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& row_weight, int64_t ignore_index, double label_smoothing,
                      double lse_square_scale, std::optional<double> softcap, double logit_scale,
                      const std::string& reduction, bool return_stats, bool /*inplace_backward*/) {
  logits_matrix(logits, kOp);
  const DeviceScope scope(logits);
  const Options options =
      checked_options(ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, reduction);
  return with_statistics(logits, [&](auto zero) {
    return forward_as<decltype(zero)>(logits, target, weight, row_weight, options, return_stats);
  });
}

struct Gradients {
  const std::optional<Tensor>& loss;
  const std::optional<Tensor>& lse;
  const std::optional<Tensor>& entropy;
};

template <typename T>
const T* strided_rows(const std::optional<Tensor>& tensor, const Tensor& logits, const char* name, int64_t& stride) {
  if (!tensor.has_value()) return nullptr;
  require_shape(*tensor, {logits.size(0)}, kOp, name);
  require_dtype(*tensor, statistics_type(logits), kOp, name);
  require_same_device(*tensor, logits, kOp, name);
  stride = tensor->stride(0);
  return static_cast<const T*>(tensor->data_ptr());
}

template <typename T>
void backward_as(const Gradients& gradients, const Tensor& logits, const Tensor& gradient, const Tensor& target,
                 const std::optional<Tensor>& weight, const std::optional<Tensor>& row_weight,
                 const std::optional<Tensor>& entropy, const Tensor& row_state, const Tensor& total,
                 const Options& options) {
  const ScalarType type = statistics_type(logits);
  CrossEntropyBackward<T> op;
  op.logits = logits_matrix(logits, kOp);
  op.gradient = row_matrix(gradient, kOp, "gradient");
  op.transform = transform_of<T>(options);
  op.dense = dense_target<T>(logits, target, weight, options);
  if (is_class_index(target)) op.target = class_indices(target, logits, options.ignore_index, kOp);
  op.ignore_index = options.ignore_index;
  op.confidence = static_cast<T>(1 - options.label_smoothing);
  op.lse_square_scale = static_cast<T>(options.lse_square_scale);
  const T* row_weights = vector_or_null<T>(row_weight, logits.size(0), logits, type, kOp, "row_weight");
  op.upstream = upstream_of<T>(gradients.loss, logits, row_weights, total, options.reduction, kOp);
  op.grad_lse = strided_rows<T>(gradients.lse, logits, "grad_lse", op.grad_lse_stride);
  op.grad_entropy = strided_rows<T>(gradients.entropy, logits, "grad_entropy", op.grad_entropy_stride);
  op.entropy = vector_or_null<T>(entropy, logits.size(0), logits, type, kOp, "entropy");
  require(op.grad_entropy == nullptr || op.entropy != nullptr, kOp, "expected entropy together with grad_entropy");
  require_shape(row_state, {3, logits.size(0)}, kOp, "row_state");
  require_dtype(row_state, type, kOp, "row_state");
  op.row_state = static_cast<const T*>(row_state.data_ptr());
  run(op, logits);
}

void backward_into(const Gradients& gradients, const Tensor& logits, const Tensor& gradient, const Tensor& target,
                   const std::optional<Tensor>& weight, const std::optional<Tensor>& row_weight,
                   const std::optional<Tensor>& entropy, const Tensor& row_state, const Tensor& total,
                   const Options& options) {
  const DeviceScope scope(logits);
  with_statistics(logits, [&](auto zero) {
    using T = decltype(zero);
    backward_as<T>(gradients, logits, gradient, target, weight, row_weight, entropy, row_state, total, options);
  });
}

Tensor backward(const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse,
                const std::optional<Tensor>& grad_entropy, const Tensor& logits, const Tensor& target,
                const std::optional<Tensor>& weight, const std::optional<Tensor>& row_weight,
                const std::optional<Tensor>& entropy, const Tensor& row_state, const Tensor& total,
                int64_t ignore_index, double label_smoothing, double lse_square_scale, std::optional<double> softcap,
                double logit_scale, const std::string& reduction) {
  logits_matrix(logits, kOp);
  const Tensor gradient = new_output(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  backward_into({grad_loss, grad_lse, grad_entropy}, logits, gradient, target, weight, row_weight, entropy, row_state,
                total,
                checked_options(ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, reduction));
  return gradient;
}

void backward_in_place(const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse,
                       const std::optional<Tensor>& grad_entropy, const Tensor& logits, const Tensor& target,
                       const std::optional<Tensor>& weight, const std::optional<Tensor>& row_weight,
                       const std::optional<Tensor>& entropy, const Tensor& row_state, const Tensor& total,
                       int64_t ignore_index, double label_smoothing, double lse_square_scale,
                       std::optional<double> softcap, double logit_scale, const std::string& reduction) {
  logits_matrix(logits, kOp);
  backward_into({grad_loss, grad_lse, grad_entropy}, logits, logits, target, weight, row_weight, entropy, row_state,
                total,
                checked_options(ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, reduction));
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_IMPL(tilewise, TILEWISE_DISPATCH_KEY, m) {
  m.impl("cross_entropy", TORCH_BOX(&tilewise::forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&tilewise::backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&tilewise::backward_in_place));
}
