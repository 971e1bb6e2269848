// Cross entropy on CUDA: chooses the row engine's kernels. Without options a call takes the plain pass and formula;
// any option takes the full ones, which are built for each storage type that the probabilities may have.
#include "cross_entropy/cross_entropy.h"

#include "rows/rows.cuh"

namespace tilewise {
namespace {

// Calls f with a null pointer to the storage type of the probabilities: void* where there are none.
template <typename Storage, typename Function>
const char* with_probability(const DenseTarget<float>& dense, Dtype storage, Function f) {
  if (dense.soft == 0.0f) return f(static_cast<void*>(nullptr));
  if (dense.probabilities.dtype == storage) return f(static_cast<Storage*>(nullptr));
  if (dense.probabilities.dtype == Dtype::kFloat32) return f(static_cast<float*>(nullptr));
  return "tilewise: probability targets must be float32 or have the dtype of the logits";
}

template <typename Storage>
const char* forward(const CrossEntropyForward<float>& op, void* stream) {
  if (is_identity(op.request.transform) && is_empty(op.request.dense) && !op.request.details)
    return launch_row_statistics<Storage, PlainSoftmax>(op, stream);
  return with_probability<Storage>(op.request.dense, op.logits.dtype, [&](auto* probability) {
    return launch_row_statistics<Storage, FullSoftmax<std::remove_pointer_t<decltype(probability)>>>(op, stream);
  });
}

template <typename Storage>
const char* backward(const CrossEntropyBackward<float>& op, void* stream) {
  const bool uniform = is_empty(op.dense) || (op.dense.weight == nullptr && op.dense.soft == 0.0f);
  if (is_identity(op.transform) && uniform && op.grad_entropy == nullptr)
    return launch_row_gradient<Storage, PlainSoftmaxGradient>(op, stream);
  return with_probability<Storage>(op.dense, op.logits.dtype, [&](auto* probability) {
    return launch_row_gradient<Storage, FullSoftmaxGradient<std::remove_pointer_t<decltype(probability)>>>(op, stream);
  });
}

}  // namespace

const char* cross_entropy_forward_cuda(const CrossEntropyForward<float>& op, void* stream) {
  return with_storage(op.logits.dtype, [&](auto tag) { return forward<decltype(tag)>(op, stream); });
}

const char* cross_entropy_reduction_cuda(const RowReduction<float>& reduction, void* stream) {
  return launch_row_reduction(reduction, stream);
}

const char* cross_entropy_backward_cuda(const CrossEntropyBackward<float>& op, void* stream) {
  return with_storage(op.logits.dtype, [&](auto tag) { return backward<decltype(tag)>(op, stream); });
}

}  // namespace tilewise
