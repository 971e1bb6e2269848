// Products of a warp on the tensor cores (csrc/common/mma.cuh has their layout), in plain C++.
#pragma once

#include <bit>
#include <cstdint>

namespace emulator {

inline float as_tf32(float x) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffffe000u); }

// All lanes bring their operands, and take them from each other. There are two places for them in turn: a lane may be
// at the next product while others still read this one's.
inline void multiply_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  struct Operands {
    float a[4], b[2];
  };
  static Operands all[2][kMostThreads];
  const Unwatched unwatched;
  const int me = machine.current, lane = me % kWarp;
  Operands* turn = all[machine.fibers[me].products++ % 2];
  for (int i = 0; i < 4; ++i) turn[me].a[i] = as_tf32(a[i]);
  for (int i = 0; i < 2; ++i) turn[me].b[i] = as_tf32(b[i]);
  shuffle(0xffffffffu, 0, 0);
  const Operands* warp = turn + (me - lane);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = 2 * (lane % 4) + i % 2, lower = i / 2;
    for (int k = 0; k < 8; ++k)
      d[i] += warp[4 * row + k % 4].a[lower + 2 * (k / 4)] * warp[4 * column + k % 4].b[k / 4];
  }
}

}  // namespace emulator
