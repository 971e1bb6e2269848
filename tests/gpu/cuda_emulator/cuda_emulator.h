// Runs CUDA kernels on the CPU: enough of the language for csrc/**/*.cu, compiled by g++ with this header in place
// of the toolkit's. The threads of a block are fibers that run one at a time; a barrier or a shuffle suspends the
// fiber until every thread it must wait for has arrived. What a GPU leaves undefined is made an error of the launch:
// barriers and shuffles that not all threads reach, vector accesses off a 16-byte boundary, bad launch shapes.
// Shared memory starts as NaNs in every block and the order of the threads alternates from block to block.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 96 * 1024;

enum class State { kReady, kBarrier, kShuffle, kDone };

struct Fiber {
  ucontext_t context;
  State state = State::kDone;
  dim3 index;
  uint64_t value = 0;  // what the lane brings to a shuffle, then what it takes away
  int source = 0;      // the lane it takes from
};

struct Machine {
  std::vector<char> stacks;
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
  std::function<void()> kernel;
  ucontext_t scheduler;
  int current = 0;
  const char* error = nullptr;
};
inline Machine machine;

inline void fail(const char* what) {
  if (machine.error == nullptr) machine.error = what;
}

inline void suspend(State state) {
  Fiber& self = machine.fibers[machine.current];
  self.state = state;
  swapcontext(&self.context, &machine.scheduler);
}

inline void fiber_main() {
  machine.kernel();
  suspend(State::kDone);
}

inline void resume(int i) {
  machine.current = i;
  Fiber& fiber = machine.fibers[i];
  threadIdx = fiber.index;
  fiber.state = State::kReady;
  swapcontext(&machine.scheduler, &fiber.context);
}

// All lanes of a full-mask shuffle wait together: hand out the values.
inline bool finish_shuffles(int threads) {
  bool progress = false;
  for (int base = 0; base < threads; base += kWarp) {
    Fiber* warp = &machine.fibers[base];
    const bool all = std::all_of(warp, warp + kWarp, [](const Fiber& f) { return f.state == State::kShuffle; });
    if (!all) continue;
    uint64_t brought[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) brought[lane] = warp[lane].value;
    for (int lane = 0; lane < kWarp; ++lane) {
      warp[lane].value = brought[warp[lane].source];
      warp[lane].state = State::kReady;
    }
    progress = true;
  }
  return progress;
}

inline bool finish_barrier(int threads) {
  Fiber* all = machine.fibers.data();
  if (!std::all_of(all, all + threads, [](const Fiber& f) { return f.state == State::kBarrier; })) return false;
  for (int i = 0; i < threads; ++i) all[i].state = State::kReady;
  return true;
}

inline void run_block(int threads, bool backwards) {
  std::fill(machine.shared.begin(), machine.shared.end(), 0xff);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.index.x = i % blockDim.x;
    fiber.index.y = i / blockDim.x % blockDim.y;
    fiber.index.z = i / blockDim.x / blockDim.y;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = machine.stacks.data() + i * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.state = State::kReady;
  }
  while (machine.error == nullptr) {
    for (int k = 0; k < threads; ++k) {
      const int i = backwards ? threads - 1 - k : k;
      if (machine.fibers[i].state == State::kReady) resume(i);
    }
    if (finish_shuffles(threads) || finish_barrier(threads)) continue;
    Fiber* all = machine.fibers.data();
    if (std::all_of(all, all + threads, [](const Fiber& f) { return f.state == State::kDone; })) return;
    fail("emulator: a barrier or shuffle that not all of its threads reach");
  }
}

inline void check_shape(dim3 grid, dim3 block) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || threads % kWarp != 0) fail("emulator: block is not 1 to 32 whole warps");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) fail("emulator: empty grid");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) fail("emulator: grid too large");
}

template <typename T>
T shuffle(unsigned mask, T value, int source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) fail("emulator: only full-mask shuffles");
  const int me = machine.current;
  Fiber& self = machine.fibers[me];
  std::memcpy(&self.value, &value, sizeof(T));
  self.source = source_lane < kWarp ? source_lane : me % kWarp;
  suspend(State::kShuffle);
  std::memcpy(&value, &machine.fibers[me].value, sizeof(T));
  return value;
}

template <typename T>
bool is_aligned(const T* address) {
  const bool aligned = reinterpret_cast<uintptr_t>(address) % sizeof(T) == 0;
  if (!aligned) fail("emulator: misaligned vector access");
  return aligned;
}

inline uint4 load(const uint4* address) {
  uint4 value = {~0u, ~0u, ~0u, ~0u};
  if (is_aligned(address)) std::memcpy(&value, address, sizeof(value));
  return value;
}

}  // namespace emulator

inline void __syncthreads() { emulator::suspend(emulator::State::kBarrier); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulator::shuffle(mask, value, (emulator::machine.current % emulator::kWarp) ^ lanes);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int lanes) {
  return emulator::shuffle(mask, value, emulator::machine.current % emulator::kWarp + lanes);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  const int lane = emulator::machine.current % emulator::kWarp;
  return emulator::shuffle(mask, value, lane >= lanes ? lane - lanes : lane);
}

inline void __syncwarp() { emulator::shuffle(0xffffffffu, 0, 0); }

inline bool __any_sync(unsigned mask, bool value) {
  int any = value;
  for (int lanes = emulator::kWarp / 2; lanes > 0; lanes /= 2) any |= __shfl_xor_sync(mask, any, lanes);
  return any != 0;
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  unsigned bits = static_cast<unsigned>(value) << (emulator::machine.current % emulator::kWarp);
  for (int lanes = emulator::kWarp / 2; lanes > 0; lanes /= 2) bits |= __shfl_xor_sync(mask, bits, lanes);
  return bits;
}

inline uint4 __ldg(const uint4* address) { return emulator::load(address); }
inline uint4 __ldcs(const uint4* address) { return emulator::load(address); }
inline void __stcs(uint4* address, uint4 value) {
  if (emulator::is_aligned(address)) std::memcpy(address, &value, sizeof(value));
}

namespace tilewise {

inline void* dynamic_shared() { return emulator::machine.shared.data(); }

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                   const Arguments&... arguments) {
  using namespace emulator;
  if (grid.x == 0) return nullptr;  // nothing to do
  machine.error = nullptr;
  check_shape(grid, block);
  if (machine.error != nullptr) return machine.error;
  const int threads = static_cast<int>(block.x * block.y * block.z);
  machine.stacks.resize(std::max(machine.stacks.size(), threads * kStackBytes));
  machine.fibers.resize(std::max<size_t>(machine.fibers.size(), threads));
  if (shared_bytes > 99 * 1024) return "more shared memory than a block of sm_86, sm_89 or sm_120 has";
  machine.shared.resize(shared_bytes);
  machine.kernel = [&] { kernel(arguments...); };
  blockDim = block;
  gridDim = grid;
  bool backwards = false;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x && machine.error == nullptr; ++blockIdx.x, backwards = !backwards)
        run_block(threads, backwards);
  return machine.error;
}

}  // namespace tilewise
