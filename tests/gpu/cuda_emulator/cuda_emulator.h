// Runs CUDA kernels on the CPU: enough of the language for csrc/**/*.cu, compiled by g++ with this header in place
// of the toolkit's. The threads of a block are fibers that run one at a time; a barrier or a shuffle suspends the
// fiber until every thread it must wait for has arrived. What a GPU leaves undefined is made an error of the launch:
// barriers and shuffles that not all threads reach, vector accesses off a 16-byte boundary, bad launch shapes, writes
// past shared memory and more of it than GPUs have. Shared memory is fresh and starts as NaNs in every block; warps go
// in a random order, their lanes forwards or backwards. ThreadSanitizer sees a thread in each fiber (ordering.h).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "ordering.h"
#include "recording.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  uint32_t x, y;
};

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
constexpr int kMostThreads = 1024;
constexpr size_t kStackBytes = kWatched ? 32 * 1024 : 96 * 1024;

constexpr size_t kGuardBytes = 4096;  // behind shared memory
constexpr unsigned char kPoison = 0xff;
constexpr size_t kSharedOfMost = 99 * 1024;  // a block's, on compute capability 8.6, 8.9 and 12.0
constexpr size_t kSharedOfAny = 227 * 1024;  // on 9.0 and 10.0

// Blocks use these sets of threads in turn: to ThreadSanitizer a block's threads come before those of the block that
// has them next. New ones for each block would take most of the time.
constexpr unsigned kPools = kWatched ? 4 : 1;

enum class State { kReady, kBarrier, kShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kDone;
  dim3 index;
  uint64_t value = 0;  // what the lane brings to a shuffle, then what it takes away
  int source = 0;      // the lane it takes from
  void* thread = nullptr;
  bool started = false;
  unsigned barriers = 0, warp_barriers = 0, products = 0;  // that it has passed
};

// What a block has of its own. In fresh memory of each, so that no barrier of one is one of the next.
struct Block {
  explicit Block(size_t shared_bytes) : shared(shared_bytes + kGuardBytes, kPoison) {}

  bool wrote_past(size_t shared_bytes) const {
    return std::any_of(shared.begin() + static_cast<std::ptrdiff_t>(shared_bytes), shared.end(),
                       [](unsigned char byte) { return byte != kPoison; });
  }

  std::vector<unsigned char> shared;
  // Two in turn: no thread is two barriers ahead of another.
  char barriers[2] = {};
  char warp_barriers[32][2] = {};
};

struct Machine {
  std::vector<Fiber> pools[kPools];
  Fiber* fibers = nullptr;  // of the block that runs
  std::unique_ptr<Block> block;
  size_t shared_bytes = 0;
  std::function<void()> kernel;
  void* address = nullptr;  // of the kernel
  ucontext_t scheduler;
  void* scheduler_thread = nullptr;
  char begin = 0, end = 0;  // of a launch: tokens
  char fence = 0;           // and one of the fences of its threads
  int current = 0;
  unsigned blocks = 0;                                 // that have begun
  uint64_t brought[kMostThreads / kWarp][kWarp] = {};  // to the last shuffle of a warp
  bool failed = false;
  std::string error;
  std::mt19937 random{1};
};
inline Machine machine;

inline void fail(const std::string& what) {
  const Unwatched unwatched;
  if (machine.failed) return;
  machine.failed = true;
  machine.error = "emulator: " + name_of(machine.address) + ": " + what;
}

inline void suspend(State state) {
  Fiber& self = machine.fibers[static_cast<size_t>(machine.current)];
  {
    const Unwatched unwatched;
    self.state = state;
  }
  go_to_thread(machine.scheduler_thread);
  swapcontext(&self.context, &machine.scheduler);
}

inline void fiber_main() {
  for (;;) {  // a block, and the next one that has these threads
    acquire(&machine.begin);
    machine.kernel();
    release(&machine.end);
    suspend(State::kDone);
  }
}

inline void resume(int i) {
  machine.current = i;
  Fiber& fiber = machine.fibers[i];
  threadIdx = fiber.index;
  fiber.state = State::kReady;
  go_to_thread(fiber.thread);
  swapcontext(&machine.scheduler, &fiber.context);
}

// All lanes of a full-mask shuffle wait together: hand out the values.
inline bool finish_shuffles(int threads) {
  bool progress = false;
  for (int base = 0; base < threads; base += kWarp) {
    Fiber* warp = &machine.fibers[base];
    const bool all = std::all_of(warp, warp + kWarp, [](const Fiber& f) { return f.state == State::kShuffle; });
    if (!all) continue;
    uint64_t* brought = machine.brought[base / kWarp];
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
  Fiber* all = machine.fibers;
  if (!std::all_of(all, all + threads, [](const Fiber& f) { return f.state == State::kBarrier; })) return false;
  for (int i = 0; i < threads; ++i) all[i].state = State::kReady;
  return true;
}

inline Fiber new_fiber() {
  Fiber fiber;
  fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  fiber.thread = new_thread();
  return fiber;
}

inline void start(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.started = true;
}

inline void begin_block(int threads) {
  machine.block = std::make_unique<Block>(machine.shared_bytes);
  std::vector<Fiber>& pool = machine.pools[machine.blocks++ % kPools];
  pool.reserve(kMostThreads);  // contexts stay where they are
  while (pool.size() < static_cast<size_t>(threads)) pool.push_back(new_fiber());
  machine.fibers = pool.data();
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.index.x = i % blockDim.x;
    fiber.index.y = i / blockDim.x % blockDim.y;
    fiber.index.z = i / blockDim.x / blockDim.y;
    if (!fiber.started) start(fiber);
    fiber.state = State::kReady;
    fiber.barriers = fiber.warp_barriers = fiber.products = 0;
  }
}

// Threads that are left in the middle of a kernel run no other.
inline void leave_threads() {
  std::vector<Fiber>& pool = machine.pools[(machine.blocks - 1) % kPools];
  for (const Fiber& fiber : pool) end_thread(fiber.thread);
  pool.clear();
}

inline void end_block() {
  if (machine.failed) leave_threads();
  if (machine.block->wrote_past(machine.shared_bytes)) fail("written past its shared memory");
  machine.block.reset();
}

inline void run_threads(int threads) {
  std::vector<int> warps(static_cast<size_t>(threads / kWarp));
  std::iota(warps.begin(), warps.end(), 0);
  const bool backwards = machine.random() % 2 == 0;
  while (!machine.failed) {
    std::shuffle(warps.begin(), warps.end(), machine.random);
    for (const int warp : warps) {
      for (int lane = 0; lane < kWarp; ++lane) {
        const int i = warp * kWarp + (backwards ? kWarp - 1 - lane : lane);
        if (machine.fibers[i].state == State::kReady) resume(i);
      }
    }
    if (finish_shuffles(threads) || finish_barrier(threads)) continue;
    Fiber* all = machine.fibers;
    if (std::all_of(all, all + threads, [](const Fiber& f) { return f.state == State::kDone; })) return;
    fail("a barrier or shuffle that not all of its threads reach");
  }
}

inline void run_block(int threads) {
  begin_block(threads);
  run_threads(threads);
  end_block();
}

inline void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMostThreads || threads % kWarp != 0) fail("block is not 1 to 32 whole warps");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) fail("empty grid");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) fail("grid too large");
  if (shared_bytes > kSharedOfAny) {
    fail(std::to_string(shared_bytes) + " bytes of shared memory, more than the 227 KiB of any GPU");
  } else if (shared_bytes > kSharedOfMost) {
    fail(std::to_string(shared_bytes) + " bytes of shared memory, more than the 99 KiB of sm_86, sm_89 and sm_120");
  }
}

template <typename T>
T shuffle(unsigned mask, T value, int source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const Unwatched unwatched;
  if (mask != 0xffffffffu) fail("only full-mask shuffles");
  const int me = machine.current;
  Fiber& self = machine.fibers[me];
  std::memcpy(&self.value, &value, sizeof(T));
  self.source = source_lane < kWarp ? source_lane : me % kWarp;
  suspend(State::kShuffle);
  std::memcpy(&value, &machine.fibers[me].value, sizeof(T));
  return value;
}

// add(.. add(0, value of lane 0, 0) .., value of lane 31, 31)
template <typename Add>
uint32_t over_lanes(unsigned mask, uint32_t value, Add add) {
  shuffle(mask, uint64_t{value}, 0);
  const Unwatched unwatched;
  uint32_t sum = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    sum = add(sum, static_cast<uint32_t>(machine.brought[machine.current / kWarp][lane]), lane);
  return sum;
}

template <typename T>
bool is_aligned(const T* address) {
  const bool aligned = reinterpret_cast<uintptr_t>(address) % sizeof(T) == 0;
  if (!aligned) fail("misaligned vector access");
  return aligned;
}

inline uint4 load(const uint4* address) {
  uint4 value = {~0u, ~0u, ~0u, ~0u};
  if (is_aligned(address)) std::memcpy(&value, address, sizeof(value));
  return value;
}

}  // namespace emulator

#include "tensor_cores.h"

// Waits as wait() does, in an order that ThreadSanitizer knows by one of two tokens.
namespace emulator {

template <typename Wait>
void ordered(char (&tokens)[2], unsigned Fiber::* passed, Wait wait) {
  unsigned turn;
  {
    const Unwatched unwatched;
    turn = (machine.fibers[static_cast<size_t>(machine.current)].*passed)++ % 2;
  }
  release(&tokens[turn]);
  wait();
  acquire(&tokens[turn]);
}

}  // namespace emulator

inline void __syncthreads() {
  using namespace emulator;
  ordered(machine.block->barriers, &Fiber::barriers, [] { suspend(State::kBarrier); });
}

#include "device_functions.h"

namespace tilewise {

inline void* dynamic_shared() { return emulator::machine.block->shared.data(); }

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                   const Arguments&... arguments) {
  using namespace emulator;
  if (grid.x == 0) return nullptr;  // nothing to do
  if (recording.on) {
    recording.launches.push_back({.kernel = reinterpret_cast<void*>(kernel),
                                  .grid = {grid.x, grid.y, grid.z},
                                  .block = {block.x, block.y, block.z},
                                  .shared_bytes = shared_bytes});
    return nullptr;
  }
  release(&machine.begin);
  {
    const Unwatched unwatched;
    machine.scheduler_thread = running_thread();
    machine.failed = false;
    machine.address = reinterpret_cast<void*>(kernel);
    check_launch(grid, block, shared_bytes);
    if (machine.failed) return machine.error.c_str();
    const int threads = static_cast<int>(block.x * block.y * block.z);
    machine.shared_bytes = shared_bytes;
    machine.kernel = [&] { kernel(arguments...); };
    blockDim = block;
    gridDim = grid;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x && !machine.failed; ++blockIdx.x) run_block(threads);
  }
  acquire(&machine.end);
  return machine.failed ? machine.error.c_str() : nullptr;
}

}  // namespace tilewise
