// The spherical family: checks, allocation and registration, compiled once for the CPU and once for CUDA.
#include "common/operator.h"
#include "rows/rows_bind.h"
#include "z_loss/z_loss.h"

namespace tilewise {
namespace {

constexpr int64_t kStatePerRow = 4;

using ForwardResult = std::tuple<Tensor, Tensor>;

template <typename T>
void run(const SphericalForward<T>& op, const RowReduction<T>& reduction, const Tensor& logits, const char* name) {
  if constexpr (kOnGpu) {
    launch_rows(op, logits, name,
                [&](const auto& parted, void* stream) { return z_loss_forward_cuda(parted, reduction, stream); });
  } else {
    for_rows(op, selected_z_loss_kernels().of<T>().forward);
    reduce_rows(reduction);
  }
}

template <typename T>
void run(const SphericalBackward<T>& op, const Tensor& logits, const char* name) {
  if constexpr (kOnGpu) {
    require_launched(z_loss_backward_cuda(op, current_stream(logits)), name);
  } else {
    for_rows(op, selected_z_loss_kernels().of<T>().backward);
  }
}

// `a` and `b` are the constants of the member.
template <typename Member>
ForwardResult forward(const Tensor& logits, const Tensor& target, int64_t ignore_index, const std::string& reduction,
                      double a = 0, double b = 0) {
  constexpr const char* kOp = Member::kName;
  const RowMatrix matrix = logits_matrix(logits, kOp);
  const DeviceScope scope(logits);
  const Reduction kind = parse_reduction(reduction, kOp);
  return with_statistics(logits, [&](auto zero) -> ForwardResult {
    using T = decltype(zero);
    SphericalForward<T> op{.logits = matrix, .member = SphericalFamily::place_of<Member>()};
    op.a = static_cast<T>(a);
    op.b = static_cast<T>(b);
    op.target = class_indices(target, matrix, ignore_index, kOp);
    op.ignore_index = ignore_index;
    const LossOutputs outputs(logits, kind, kStatePerRow);
    op.loss_rows = outputs.loss_rows<T>();
    op.share_rows = outputs.share_rows<T>();
    op.row_state = outputs.row_state<T>();
    run(op, outputs.reduction<T>(), logits, kOp);
    return {outputs.loss, outputs.state};
  });
}

ForwardResult z_loss(const Tensor& logits, const Tensor& target, double a, double b, int64_t ignore_index,
                     const std::string& reduction) {
  require(a > 0, "z_loss", "expected a above 0, got ", a);
  return forward<ZLoss>(logits, target, ignore_index, reduction, a, b);
}

ForwardResult taylor_softmax_loss(const Tensor& logits, const Tensor& target, int64_t ignore_index,
                                  const std::string& reduction) {
  return forward<TaylorSoftmax>(logits, target, ignore_index, reduction);
}

ForwardResult spherical_softmax_loss(const Tensor& logits, const Tensor& target, double eps, int64_t ignore_index,
                                     const std::string& reduction) {
  require(eps >= 0, "spherical_softmax_loss", "expected eps not below 0, got ", eps);
  return forward<SphericalSoftmax>(logits, target, ignore_index, reduction, eps);
}

Tensor backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target, const Tensor& state,
                int64_t ignore_index, const std::string& reduction) {
  constexpr const char* kOp = "spherical_family_backward";
  const RowMatrix matrix = logits_matrix(logits, kOp);
  const DeviceScope scope(logits);
  const Tensor gradient = new_output(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  const Reduction kind = parse_reduction(reduction, kOp);
  with_statistics(logits, [&](auto zero) {
    using T = decltype(zero);
    SphericalBackward<T> op{.logits = matrix, .gradient = row_matrix(gradient, kOp, "gradient")};
    op.target = class_indices(target, matrix, ignore_index, kOp);
    op.ignore_index = ignore_index;
    op.row_state = state_of<T>(state, logits, kStatePerRow, kOp);
    op.upstream = upstream_of<T>(grad_loss, logits, nullptr, op.row_state + kStatePerRow * matrix.rows, kind, kOp);
    run(op, logits, kOp);
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
