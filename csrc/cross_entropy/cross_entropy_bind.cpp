// cross_entropy: checks, allocation and registration, compiled once for the CPU and once for CUDA.
#include "cross_entropy/cross_entropy_bind.h"
#include "common/operator.h"

namespace tilewise {
namespace {

constexpr const char* kOp = "cross_entropy";

// As the schemas list them.
struct GivenOptions {
  int64_t ignore_index;
  double label_smoothing;
  double lse_square_scale;
  std::optional<double> softcap;
  double logit_scale;
  const std::string& reduction;

  CrossEntropyOptions checked() const {
    return checked_options(ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, reduction, kOp);
  }
};

struct ForwardArguments {
  const Tensor& logits;
  const Tensor& target;
  const std::optional<Tensor>& weight;
  const std::optional<Tensor>& row_weight;
  GivenOptions options;
  bool inplace_backward;  // concerns autograd alone: it chooses which backward operator runs
};
using MaybeTensor = const std::optional<Tensor>&;
using ForwardFields = Fields<const Tensor&, const Tensor&, MaybeTensor, MaybeTensor, int64_t, double, double,
                             std::optional<double>, double, const std::string&, bool>;

struct Statistics {
  Tensor lse, entropy, argmax;
};

template <typename T>
LossOutputs forward_as(const ForwardArguments& given, const CrossEntropyOptions& options, const Statistics* stats) {
  const Tensor& logits = given.logits;
  CrossEntropyForward<T> op;
  op.logits = logits_matrix(logits, kOp);
  op.request = {transform_of<T>(options), dense_target<T>(logits, op.logits, given.target, given.weight, options, kOp),
                stats != nullptr};
  if (is_class_index(given.target)) op.target = class_indices(given.target, op.logits, options.ignore_index, kOp);
  op.row_weight = dense<T>(given.row_weight, {logits.size(0)}, statistics_type(logits), kOp, "row_weight");
  op.ignore_index = options.ignore_index;
  op.confidence = static_cast<T>(1 - options.label_smoothing);
  op.lse_square_scale = static_cast<T>(options.lse_square_scale);
  if (stats != nullptr) {
    op.lse = static_cast<T*>(stats->lse.data_ptr());
    op.entropy = static_cast<T*>(stats->entropy.data_ptr());
    op.argmax = static_cast<int64_t*>(stats->argmax.data_ptr());
  }
  const LossOutputs outputs(logits, options.reduction, kStatePerRow);
  op.loss_rows = outputs.loss_rows<T>();
  op.share_rows = outputs.share_rows<T>();
  op.row_state = outputs.row_state<T>();
  run(op, logits, kOp);
  run(outputs.reduction<T>(), logits, kOp);
  return outputs;
}

// With statistics where there is a place for them.
LossOutputs run_forward(const ForwardArguments& given, const Statistics* stats) {
  const DeviceScope scope(given.logits);
  const CrossEntropyOptions options = given.options.checked();
  return with_statistics(given.logits, [&](auto zero) { return forward_as<decltype(zero)>(given, options, stats); });
}

std::tuple<Tensor, Tensor> forward(const ForwardArguments& given) {
  const LossOutputs outputs = run_forward(given, nullptr);
  return {outputs.loss, outputs.state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_with_stats(const ForwardArguments& given) {
  logits_matrix(given.logits, kOp);
  const auto of_rows = [&](ScalarType type) { return new_output(given.logits, {given.logits.size(0)}, type); };
  const ScalarType type = statistics_type(given.logits);
  const Statistics stats{of_rows(type), of_rows(type), of_rows(ScalarType::Long)};
  const LossOutputs outputs = run_forward(given, &stats);
  return {outputs.loss, outputs.state, stats.lse, stats.entropy, stats.argmax};
}

struct BackwardArguments {
  const std::optional<Tensor>& grad_loss;
  const std::optional<Tensor>& grad_lse;
  const std::optional<Tensor>& grad_entropy;
  const Tensor& logits;
  const Tensor& target;
  const std::optional<Tensor>& weight;
  const std::optional<Tensor>& row_weight;
  const std::optional<Tensor>& entropy;
  const Tensor& state;
  GivenOptions options;
};
using BackwardFields =
    Fields<MaybeTensor, MaybeTensor, MaybeTensor, const Tensor&, const Tensor&, MaybeTensor, MaybeTensor, MaybeTensor,
           const Tensor&, int64_t, double, double, std::optional<double>, double, const std::string&>;

template <typename T>
const T* strided_rows(const std::optional<Tensor>& tensor, const Tensor& logits, const char* name, int64_t& stride) {
  if (!tensor.has_value()) return nullptr;
  require_shape(*tensor, {logits.size(0)}, kOp, name);
  require_dtype(*tensor, statistics_type(logits), kOp, name);
  stride = tensor->stride(0);
  return static_cast<const T*>(tensor->data_ptr());
}

template <typename T>
void backward_as(const BackwardArguments& given, const Tensor& gradient) {
  const Tensor& logits = given.logits;
  const ScalarType type = statistics_type(logits);
  const CrossEntropyOptions options = given.options.checked();
  CrossEntropyBackward<T> op;
  op.logits = logits_matrix(logits, kOp);
  op.gradient = row_matrix(gradient, kOp, "gradient");
  op.transform = transform_of<T>(options);
  op.dense = dense_target<T>(logits, op.logits, given.target, given.weight, options, kOp);
  if (is_class_index(given.target)) op.target = class_indices(given.target, op.logits, options.ignore_index, kOp);
  op.ignore_index = options.ignore_index;
  op.confidence = static_cast<T>(1 - options.label_smoothing);
  op.lse_square_scale = static_cast<T>(options.lse_square_scale);
  op.row_state = state_of<T>(given.state, logits, kStatePerRow, kOp);
  const T* row_weights = dense<T>(given.row_weight, {logits.size(0)}, type, kOp, "row_weight");
  const T* total = op.row_state + kStatePerRow * logits.size(0);
  op.upstream = upstream_of<T>(given.grad_loss, logits, row_weights, total, options.reduction, kOp);
  op.grad_lse = strided_rows<T>(given.grad_lse, logits, "grad_lse", op.grad_lse_stride);
  op.grad_entropy = strided_rows<T>(given.grad_entropy, logits, "grad_entropy", op.grad_entropy_stride);
  op.entropy = dense<T>(given.entropy, {logits.size(0)}, type, kOp, "entropy");
  require(op.grad_entropy == nullptr || op.entropy != nullptr, kOp, "expected entropy together with grad_entropy");
  run(op, logits, kOp);
}

void backward_into(const Tensor& gradient, const BackwardArguments& given) {
  const DeviceScope scope(given.logits);
  with_statistics(given.logits, [&](auto zero) { backward_as<decltype(zero)>(given, gradient); });
}

Tensor backward(const BackwardArguments& given) {
  const Tensor& logits = given.logits;
  logits_matrix(logits, kOp);
  const Tensor gradient = new_output(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  backward_into(gradient, given);
  return gradient;
}

void backward_in_place(const BackwardArguments& given) {
  const Tensor& logits = given.logits;
  require(!overlaps(logits_matrix(logits, kOp)), kOp, "expected logits whose elements do not share memory, got shape ",
          shape_of(logits), " with strides (", logits.stride(0), ", ", logits.stride(1), ")");
  backward_into(logits, given);
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_IMPL(tilewise, TILEWISE_DISPATCH_KEY, m) {
  TILEWISE_IMPL(m, "cross_entropy", tilewise::ForwardFields::call<&tilewise::forward>);
  TILEWISE_IMPL(m, "cross_entropy_with_stats", tilewise::ForwardFields::call<&tilewise::forward_with_stats>);
  TILEWISE_IMPL(m, "cross_entropy_backward", tilewise::BackwardFields::call<&tilewise::backward>);
  TILEWISE_IMPL(m, "cross_entropy_backward_", tilewise::BackwardFields::call<&tilewise::backward_in_place>);
}
