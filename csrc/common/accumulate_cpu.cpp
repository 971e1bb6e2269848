// Float32 sums of 16-bit products on the CPU, for one instruction set.
#include "common/accumulate.h"

namespace tilewise::TILEWISE_ISA {
namespace {

template <typename Storage>
void accumulate_as(const Accumulation& op, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) accumulate_element<Storage>(op, i);
}

void accumulate(const Accumulation& op, int64_t begin, int64_t end) {
  if (op.dtype == Dtype::kBFloat16) {
    accumulate_as<BFloat16>(op, begin, end);
  } else {
    accumulate_as<Float16>(op, begin, end);
  }
}

}  // namespace

extern const AccumulateKernels accumulate_kernels{.accumulate = accumulate};

}  // namespace tilewise::TILEWISE_ISA
