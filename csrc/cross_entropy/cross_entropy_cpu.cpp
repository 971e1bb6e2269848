// cross_entropy on the CPU: the softmax passes of the row engine, for one instruction set.
#include "cross_entropy/cross_entropy.h"
#include "rows/rows_cpu.h"

namespace tilewise::TILEWISE_ISA {

extern const CrossEntropyKernels cross_entropy_kernels{
    .forward_float = softmax_forward<CrossEntropyForward<float>>,
    .forward_double = softmax_forward<CrossEntropyForward<double>>,
    .backward_float = row_backward<true, CrossEntropyBackward<float>>,
    .backward_double = row_backward<true, CrossEntropyBackward<double>>,
};

}  // namespace tilewise::TILEWISE_ISA
