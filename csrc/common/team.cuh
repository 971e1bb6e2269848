// The threads along x of a block as a team: a warp (blockDim.x = kWarp, no barrier: blocks may hold several) or a
// block.
#pragma once

#include "common/launch.cuh"
#include "common/platform.h"

namespace tilewise {

// Over kLanes neighbouring lanes of a warp: the same for all of them, combined in a fixed order.
template <int kLanes, typename T, typename Combine>
__device__ __forceinline__ T over_lanes(T value, const Combine& combine) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
}

struct Plus {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// The sum over the lanes of a warp up to this one.
template <typename T>
__device__ __forceinline__ T sum_up_to_lane(T value) {
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, value, lanes);
    if (threadIdx.x % kWarp >= lanes) value += other;
  }
  return value;
}

// Whether all of so many blocks have written what they have to, and this was the last. shared: one number.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, int64_t blocks, unsigned* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *shared = atomicAdd(ticket, 1u) % static_cast<unsigned>(blocks);
  __syncthreads();
  const bool last = *shared == static_cast<unsigned>(blocks) - 1;
  if (last) __threadfence();
  return last;
}

// A warp alone, of which a block may hold several.
class Warp {
 public:
  __device__ __forceinline__ unsigned rank() const { return threadIdx.x % kWarp; }
  __device__ __forceinline__ unsigned size() const { return kWarp; }
  __device__ __forceinline__ bool first() const { return rank() == 0; }
  __device__ __forceinline__ void wait() const { __syncwarp(); }

  template <typename T, typename Combine>
  __device__ __forceinline__ T all(T value, const Combine& combine) const {
    return over_lanes<kWarp>(value, combine);
  }

  template <typename T>
  __device__ __forceinline__ T all_sum(T value) const {
    return all(value, Plus{});
  }

  // Of kCount numbers at once.
  template <int kCount>
  __device__ __forceinline__ void all_sums(uint32_t (&counts)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) counts[j] = __reduce_add_sync(0xffffffffu, counts[j]);
  }

  template <int kCount>
  __device__ __forceinline__ void all_largest(uint32_t (&numbers)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) numbers[j] = __reduce_max_sync(0xffffffffu, numbers[j]);
  }

  __device__ __forceinline__ void all_sum(float& sum, uint32_t& count) const {
    sum = all_sum(sum);
    count = __reduce_add_sync(0xffffffffu, count);
  }
};

class Team {
 public:
  static constexpr int kMostWarps = 32;

  // shared: kMostWarps numbers of 8 bytes.
  __device__ __forceinline__ explicit Team(void* shared) : shared_(shared) {}

  __device__ __forceinline__ int64_t rank() const { return threadIdx.x; }
  __device__ __forceinline__ int64_t size() const { return blockDim.x; }
  __device__ __forceinline__ bool first() const { return threadIdx.x == 0; }

  template <typename Function>
  __device__ __forceinline__ void each(int64_t n, const Function& f) const {
#pragma unroll 4
    for (int64_t i = rank(); i < n; i += size()) f(i);
    wait();
  }

  // The same for all, combined in a fixed order.
  template <typename T, typename Combine>
  __device__ __forceinline__ T all(T value, const Combine& combine) const {
    value = over_lanes<kWarp>(value, combine);
    if (blockDim.x == kWarp) return value;
    T* of_warps = static_cast<T*>(shared_);
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
    __syncthreads();
    T total = of_warps[0];
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) total = combine(total, of_warps[warp]);
    __syncthreads();
    return total;
  }

  template <typename T>
  __device__ __forceinline__ T all_sum(T value) const {
    return all(value, Plus{});
  }

  // Of kCount numbers at once; of four there is room for 16 warps.
  template <int kCount>
  __device__ __forceinline__ void all_sums(uint32_t (&counts)[kCount]) const {
    over_warps(counts, [](uint32_t(&of_lanes)[kCount]) { Warp().all_sums(of_lanes); });
  }

  template <int kCount>
  __device__ __forceinline__ void all_largest(uint32_t (&numbers)[kCount]) const {
    over_warps(numbers, [](uint32_t(&of_lanes)[kCount]) { Warp().all_largest(of_lanes); });
  }

  __device__ __forceinline__ void all_sum(float& sum, uint32_t& count) const {
    Warp().all_sum(sum, count);
    if (blockDim.x == kWarp) return;
    const unsigned warps = blockDim.x / kWarp;
    float* sums = static_cast<float*>(shared_);
    uint32_t* counts = static_cast<uint32_t*>(shared_) + warps;
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum, counts[threadIdx.x / kWarp] = count;
    __syncthreads();
    sum = sums[0];
    for (unsigned warp = 1; warp < warps; ++warp) sum += sums[warp];
    count = __reduce_add_sync(0xffffffffu, threadIdx.x % kWarp < warps ? counts[threadIdx.x % kWarp] : 0u);
    __syncthreads();
  }

  // Of a number that is the same for the lanes of a warp, the sum over the warps before; `total` becomes that of all.
  __device__ __forceinline__ uint32_t warps_before(uint32_t value, uint32_t& total) const {
    total = value;
    if (blockDim.x == kWarp) return 0;
    uint32_t* of_warps = static_cast<uint32_t*>(shared_);
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
    __syncthreads();
    const unsigned lane = threadIdx.x % kWarp;
    const uint32_t of_lane = lane < blockDim.x / kWarp ? of_warps[lane] : 0u;
    uint32_t sums[] = {of_lane, lane < threadIdx.x / kWarp ? of_lane : 0u};
    Warp().all_sums(sums);
    __syncthreads();
    total = sums[0];
    return sums[1];
  }

  // The sum over the threads before this one; `total` becomes that of all.
  template <typename T>
  __device__ __forceinline__ T sum_before(T value, T& total) const {
    T sum = sum_up_to_lane(value);
    T* of_warps = static_cast<T*>(shared_);
    if (threadIdx.x % kWarp == kWarp - 1) of_warps[threadIdx.x / kWarp] = sum;
    __syncthreads();
    total = T(0);
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
      if (warp == threadIdx.x / kWarp) sum += total;
      total += of_warps[warp];
    }
    __syncthreads();
    return sum - value;
  }

  template <typename Function>
  __device__ __forceinline__ double sum(int64_t n, const Function& f) const {
    double total = 0.0;
#pragma unroll 4
    for (int64_t i = rank(); i < n; i += size()) total += f(i);
    return all_sum(total);
  }

  // What any of them wrote or read before comes before what any does after.
  __device__ __forceinline__ void wait() const {
    if (blockDim.x == kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

 private:
  // Numbers of the threads to one of all: `of_lanes` does so in a warp, where 0 changes nothing.
  template <int kCount, typename OfLanes>
  __device__ __forceinline__ void over_warps(uint32_t (&numbers)[kCount], const OfLanes& of_lanes) const {
    of_lanes(numbers);
    if (blockDim.x == kWarp) return;
    uint32_t* of_warps = static_cast<uint32_t*>(shared_);
    const unsigned lane = threadIdx.x % kWarp;
    if (lane == 0) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) of_warps[threadIdx.x / kWarp * kCount + j] = numbers[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kCount; ++j) numbers[j] = lane < blockDim.x / kWarp ? of_warps[lane * kCount + j] : 0u;
    of_lanes(numbers);
    __syncthreads();
  }

  void* shared_;
};

// (threads of a row, rows of a block)
inline dim3 team_block(int64_t size) { return size <= 1024 ? dim3(kWarp, 8) : dim3(256, 1); }
inline int64_t team_blocks(int64_t rows, dim3 block) { return (rows + block.y - 1) / block.y; }
constexpr size_t kTeamBytes = Team::kMostWarps * 8;

}  // namespace tilewise
