// Float32 sums of 16-bit products on CUDA, four elements a thread.
#include "common/accumulate.h"
#include "common/launch.cuh"

namespace tilewise {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;

template <typename Storage>
__global__ void __launch_bounds__(kThreads) accumulate_kernel(const __grid_constant__ Accumulation op) {
  const int64_t base = flat_block() * kThreads * kPerThread + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t element = base + i * kThreads;
    if (element < op.count) accumulate_element<Storage>(op, element);
  }
}

}  // namespace

const char* accumulate_cuda(const Accumulation& op, void* stream) {
  constexpr int64_t kPerBlock = kThreads * kPerThread;
  const dim3 grid = flat_grid((op.count + kPerBlock - 1) / kPerBlock);
  if (op.dtype == Dtype::kBFloat16) return launch(accumulate_kernel<BFloat16>, grid, dim3(kThreads), 0, stream, op);
  return launch(accumulate_kernel<Float16>, grid, dim3(kThreads), 0, stream, op);
}

}  // namespace tilewise
