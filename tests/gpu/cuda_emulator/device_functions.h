// What kernels call of a GPU beyond C++: shuffles and other words of a warp, fences, atomics, cached loads and stores.
// Part of cuda_emulator.h.
#pragma once

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

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::shuffle(mask, value, lane % emulator::kWarp);
}

inline void __syncwarp() {
  using namespace emulator;
  ordered(machine.block->warp_barriers[machine.current / kWarp], &Fiber::warp_barriers,
          [] { shuffle(0xffffffffu, 0, 0); });
}

inline uint32_t __reduce_add_sync(unsigned mask, uint32_t value) {
  return emulator::over_lanes(mask, value, [](uint32_t sum, uint32_t of_lane, int) { return sum + of_lane; });
}

inline uint32_t __reduce_max_sync(unsigned mask, uint32_t value) {
  return emulator::over_lanes(mask, value,
                              [](uint32_t most, uint32_t of_lane, int) { return std::max(most, of_lane); });
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  return emulator::over_lanes(mask, value, [](uint32_t bits, uint32_t bit, int lane) { return bits | bit << lane; });
}

inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }

inline int __popc(unsigned bits) { return std::popcount(bits); }

// Orders what blocks write and read in other blocks.
inline void __threadfence() {
  using namespace emulator;
  acquire(&machine.fence);
  release(&machine.fence);
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline float __fmul_rn(float a, float b) { return a * b; }

inline uint4 __ldg(const uint4* address) { return emulator::load(address); }
inline uint4 __ldcs(const uint4* address) { return emulator::load(address); }
template <typename Vector>
void __stcs(Vector* address, Vector value) {
  if (emulator::is_aligned(address)) std::memcpy(address, &value, sizeof(value));
}
