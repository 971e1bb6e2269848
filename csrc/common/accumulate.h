// Products of 16-bit factors are rounded to 16 bits; their sums over blocks are kept in float32 and rounded once:
//
//   sum = part (first) or sum + part;   out = sum, rounded (last)
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace tilewise {

struct Accumulation {
  Dtype dtype = Dtype::kBFloat16;  // of part and out
  const void* part = nullptr;
  float* sum = nullptr;
  void* out = nullptr;  // written when last
  int64_t count = 0;
  bool first = false;
  bool last = false;
};

template <typename Storage>
TILEWISE_FN void accumulate_element(const Accumulation& op, int64_t i) {
  const float part = to_float(static_cast<const Storage*>(op.part)[i]);
  const float sum = op.first ? part : op.sum[i] + part;
  op.sum[i] = sum;
  if (op.last) from_float(sum, static_cast<Storage*>(op.out)[i]);
}

struct AccumulateKernels {
  void (*accumulate)(const Accumulation&, int64_t begin, int64_t end);  // elements [begin, end)
};
TILEWISE_DECLARE_KERNELS(AccumulateKernels, accumulate_kernels)

// A CUDA error string, or null.
const char* accumulate_cuda(const Accumulation& op, void* stream);

}  // namespace tilewise
