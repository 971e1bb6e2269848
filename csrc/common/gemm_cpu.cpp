// Matrix products on the CPU, for one instruction set.
#include "common/gemm_tile.h"

namespace tilewise::TILEWISE_ISA {

extern const ForTypes<GemmKernels> gemm_kernels{{multiply_units<float>}, {multiply_units<double>}};

}  // namespace tilewise::TILEWISE_ISA
