// cross_entropy on the CPU: the softmax passes of the row engine, for one instruction set.
#include "cross_entropy/cross_entropy.h"
#include "rows/rows_cpu.h"

namespace tilewise::TILEWISE_ISA {

template <typename T>
constexpr CrossEntropyKernels<T> kernels{softmax_forward<CrossEntropyForward<T>>,
                                         row_backward<true, CrossEntropyBackward<T>>};

extern const ForTypes<CrossEntropyKernels> cross_entropy_kernels{kernels<float>, kernels<double>};

}  // namespace tilewise::TILEWISE_ISA
