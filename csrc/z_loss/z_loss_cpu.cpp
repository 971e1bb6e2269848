// The spherical family on the CPU: the moment passes of the row engine, for one instruction set.
#include "rows/rows_cpu.h"
#include "z_loss/z_loss.h"

namespace tilewise::TILEWISE_ISA {

extern const ZLossKernels z_loss_kernels{
    .forward_float = moment_forward<float, SphericalForward>,
    .forward_double = moment_forward<double, SphericalForward>,
    .backward_float = row_backward<false, SphericalBackward<float>>,
    .backward_double = row_backward<false, SphericalBackward<double>>,
};

}  // namespace tilewise::TILEWISE_ISA
