// Kernels that are wrong on purpose: what the emulator says is tested, and what ThreadSanitizer says before each `make
// race`.
#include "calls.h"
#include "common/launch.cuh"

namespace {

void divergent_barrier() {  // half of a block leaves before it
  if (threadIdx.x < 64) __syncthreads();
}

void divergent_shuffle() {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

void misaligned_load(const char* data) { __ldg(reinterpret_cast<const uint4*>(data + 8)); }

void past_shared_memory() { static_cast<float*>(tilewise::dynamic_shared())[threadIdx.x + 1] = 1.0f; }

void nothing() {}

// The other end's number after a barrier, or without one.
template <bool kBarrier>
void reversed(float* out) {
  float* shared = static_cast<float*>(tilewise::dynamic_shared());
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// Written again before all have read.
void written_again() {
  float* shared = static_cast<float*>(tilewise::dynamic_shared());
  float sum = 0.0f;
  for (int i = 0; i < 3; ++i) {
    shared[threadIdx.x] = static_cast<float>(i);
    __syncthreads();
    sum += shared[blockDim.x - 1 - threadIdx.x];
  }
  shared[threadIdx.x] = sum;
}

// A shuffle is no __syncwarp().
void ordered_by_a_shuffle() {
  float* shared = static_cast<float*>(tilewise::dynamic_shared());
  shared[threadIdx.x] = 1.0f;
  __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  shared[threadIdx.x] = shared[threadIdx.x ^ 1] + 1.0f;
}

// The same thread of every block.
void written_by_two_blocks(float* out) {
  __syncthreads();
  out[threadIdx.x] = static_cast<float>(blockIdx.x);
  __syncthreads();
}

}  // namespace

extern "C" const char* wrong_kernel(int which) {
  using tilewise::launch;
  alignas(16) const char data[32] = {};
  static float results[128];
  float* const out = results;
  constexpr size_t kShared = 64 * sizeof(float);
  const dim3 two(2), warps(64);
  switch (which) {
    case 0:
      return launch(divergent_barrier, dim3(1), dim3(128), 0, nullptr);
    case 1:
      return launch(divergent_shuffle, dim3(1), dim3(128), 0, nullptr);
    case 2:
      return launch(misaligned_load, dim3(1), dim3(32), 0, nullptr, static_cast<const char*>(data));
    case 3:
      return launch(past_shared_memory, two, warps, kShared, nullptr);
    case 4:
      return launch(nothing, two, warps, 100 << 10, nullptr);
    case 5:
      return launch(nothing, two, warps, 228 << 10, nullptr);
    case 6:
      return launch(reversed<false>, two, warps, kShared, nullptr, out);
    case 7:
      return launch(written_again, two, warps, kShared, nullptr);
    case 8:
      return launch(ordered_by_a_shuffle, two, warps, kShared, nullptr);
    case 9:
      return launch(written_by_two_blocks, two, warps, kShared, nullptr, out);
    default:
      return launch(reversed<true>, two, warps, kShared, nullptr, out);  // right
  }
}
