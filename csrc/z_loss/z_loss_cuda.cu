// The spherical family on CUDA: moments going forward, one affine formula going back.
#include "rows/rows.cuh"
#include "z_loss/z_loss.h"

namespace tilewise {

const char* z_loss_forward_cuda(const SphericalForward<float>& op, const RowReduction<float>& reduction, void* stream) {
  const char* error = with_storage(
      op.logits.dtype, [&](auto tag) { return launch_row_statistics<decltype(tag), RowMoments>(op, stream); });
  return error != nullptr ? error : launch_row_reduction(reduction, stream);
}

const char* z_loss_backward_cuda(const SphericalBackward<float>& op, void* stream) {
  return with_storage(op.logits.dtype,
                      [&](auto tag) { return launch_row_gradient<decltype(tag), AffineGradient>(op, stream); });
}

}  // namespace tilewise
