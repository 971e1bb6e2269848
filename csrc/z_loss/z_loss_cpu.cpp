// The spherical family on the CPU: the moment passes of the row engine, for one instruction set.
#include "rows/rows_cpu.h"
#include "z_loss/z_loss.h"

namespace tilewise::TILEWISE_ISA {

template <typename T>
constexpr ZLossKernels<T> kernels{moment_forward<T, SphericalForward>, row_backward<false, SphericalBackward<T>>};

extern const ForTypes<ZLossKernels> z_loss_kernels{kernels<float>, kernels<double>};

}  // namespace tilewise::TILEWISE_ISA
