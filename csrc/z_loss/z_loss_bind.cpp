// The spherical family: checks, allocation and registration, compiled once for the CPU and once for CUDA.
#include "common/operator.h"
#include "rows/rows_bind.h"
#include "z_loss/z_loss.h"

namespace tilewise {
namespace {

struct Member {
  const char* op;
  SphericalKind kind;
  double a = 1;
  double b = 0;
  double eps = 0;
};

using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
void run(const SphericalForward<T>& op, const RowReduction<T>& reduction, [[maybe_unused]] const Member& member,
         [[maybe_unused]] const Tensor& logits) {
#if defined(TILEWISE_CUDA)
  require_launched(z_loss_forward_cuda(op, reduction, current_stream(logits)), member.op);
#else
  const ZLossKernels& kernels = selected_z_loss_kernels();
  for_rows(op, kernels.forward_float, kernels.forward_double);
  reduce_rows(reduction);
#endif
}

template <typename T>
ForwardResult forward_as(const Member& member, const Tensor& logits, const Tensor& target, int64_t ignore_index,
                         Reduction reduction) {
  SphericalForward<T> op;
  op.logits = logits_matrix(logits, member.op);
  op.kind = member.kind;
  op.a = static_cast<T>(member.a);
  op.b = static_cast<T>(member.b);
  op.eps = static_cast<T>(member.eps);
  op.target = class_indices(target, op.logits, ignore_index, member.op);
  op.ignore_index = ignore_index;
  const LossOutputs outputs(logits, reduction);
  const Tensor row_state = new_output(logits, {4, logits.size(0)}, statistics_type(logits));
  op.loss_rows = static_cast<T*>(outputs.loss_rows.data_ptr());
  op.share_rows = static_cast<T*>(outputs.share_rows.data_ptr());
  op.row_state = static_cast<T*>(row_state.data_ptr());
  run(op, outputs.reduction<T>(reduction), member, logits);
  return {outputs.loss, row_state, outputs.total};
}

ForwardResult forward(const Member& member, const Tensor& logits, const Tensor& target, int64_t ignore_index,
                      const std::string& reduction) {
  logits_matrix(logits, member.op);
  const DeviceScope scope(logits);
  const Reduction kind = parse_reduction(reduction, member.op);
  return with_statistics(
      logits, [&](auto zero) { return forward_as<decltype(zero)>(member, logits, target, ignore_index, kind); });
}

ForwardResult z_loss(const Tensor& logits, const Tensor& target, double a, double b, int64_t ignore_index,
                     const std::string& reduction) {
  require(a > 0, "z_loss", "expected a above 0, got ", a);
  return forward({"z_loss", SphericalKind::kZ, a, b}, logits, target, ignore_index, reduction);
}

ForwardResult taylor_softmax_loss(const Tensor& logits, const Tensor& target, int64_t ignore_index,
                                  const std::string& reduction) {
  return forward({"taylor_softmax_loss", SphericalKind::kTaylor}, logits, target, ignore_index, reduction);
}

ForwardResult spherical_softmax_loss(const Tensor& logits, const Tensor& target, double eps, int64_t ignore_index,
                                     const std::string& reduction) {
  require(eps >= 0, "spherical_softmax_loss", "expected eps not below 0, got ", eps);
  const Member member{.op = "spherical_softmax_loss", .kind = SphericalKind::kSpherical, .eps = eps};
  return forward(member, logits, target, ignore_index, reduction);
}

template <typename T>
void backward_as(const Tensor& grad_loss, const Tensor& logits, const Tensor& gradient, const Tensor& target,
                 const Tensor& row_state, const Tensor& total, int64_t ignore_index, Reduction reduction) {
  constexpr const char* kOp = "spherical_family_backward";
  SphericalBackward<T> op;
  op.logits = logits_matrix(logits, kOp);
  op.gradient = row_matrix(gradient, kOp, "gradient");
  op.target = class_indices(target, op.logits, ignore_index, kOp);
  op.ignore_index = ignore_index;
  op.upstream = upstream_of<T>(grad_loss, logits, nullptr, total, reduction, kOp);
  op.row_state = dense<T>(row_state, {4, logits.size(0)}, statistics_type(logits), kOp, "row_state");
#if defined(TILEWISE_CUDA)
  require_launched(z_loss_backward_cuda(op, current_stream(logits)), kOp);
#else
  const ZLossKernels& kernels = selected_z_loss_kernels();
  for_rows(op, kernels.backward_float, kernels.backward_double);
#endif
}

Tensor backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target, const Tensor& row_state,
                const Tensor& total, int64_t ignore_index, const std::string& reduction) {
  constexpr const char* kOp = "spherical_family_backward";
  logits_matrix(logits, kOp);
  const DeviceScope scope(logits);
  const Tensor gradient = new_output(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  const Reduction kind = parse_reduction(reduction, kOp);
  with_statistics(logits, [&](auto zero) {
    backward_as<decltype(zero)>(grad_loss, logits, gradient, target, row_state, total, ignore_index, kind);
  });
  return gradient;
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_IMPL(tilewise, TILEWISE_DISPATCH_KEY, m) {
  TILEWISE_IMPL(m, "z_loss", tilewise::z_loss);
  TILEWISE_IMPL(m, "taylor_softmax_loss", tilewise::taylor_softmax_loss);
  TILEWISE_IMPL(m, "spherical_softmax_loss", tilewise::spherical_softmax_loss);
  TILEWISE_IMPL(m, "spherical_family_backward", tilewise::backward);
}
