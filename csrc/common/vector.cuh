// Runs of consecutive elements in registers, moved as 16-byte vectors where the address allows.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "common/launch.cuh"

namespace tilewise {

template <typename Storage, int kCount>
struct Run {
  Storage value[kCount];
};

// Four floats of shared or global memory, on a 16-byte boundary.
struct Quad {
  float value[4];
};

__device__ __forceinline__ Quad load_quad(const float* address) {
  const uint4 piece = *reinterpret_cast<const uint4*>(address);
  Quad quad;
  memcpy(&quad, &piece, sizeof(quad));
  return quad;
}

__device__ __forceinline__ void store_quad(float* address, const Quad& quad) {
  uint4 piece;
  memcpy(&piece, &quad, sizeof(piece));
  *reinterpret_cast<uint4*>(address) = piece;
}

// Elements in one 16-byte vector.
template <typename Storage>
inline constexpr int kVector = 16 / sizeof(Storage);

TILEWISE_FN bool is_vector_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// kLastUse: nothing will read these bytes again, so they need not displace others from the caches; it is also
// the kind to use where the kernel overwrites what it reads (the other goes through the read-only path).
template <bool kLastUse, int kCount, typename Storage>
__device__ __forceinline__ Run<Storage, kCount> load_vectors(const Storage* address) {
  constexpr int kPieces = kCount / kVector<Storage>;
  static_assert(kPieces * kVector<Storage> == kCount);
  Run<Storage, kCount> run;
  const uint4* source = reinterpret_cast<const uint4*>(address);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const uint4 piece = kLastUse ? __ldcs(source + i) : __ldg(source + i);
    memcpy(run.value + i * kVector<Storage>, &piece, sizeof(piece));
  }
  return run;
}

template <typename Storage, int kCount>
__device__ __forceinline__ void store_vectors(Storage* address, const Run<Storage, kCount>& run) {
  static_assert(kCount == kVector<Storage>);
  uint4 piece;
  memcpy(&piece, run.value, sizeof(piece));
  __stcs(reinterpret_cast<uint4*>(address), piece);
}

// In one store, of 8 or 16 bytes.
template <typename Storage, int kCount>
__device__ __forceinline__ void store_run(Storage* address, const Run<Storage, kCount>& run) {
  if constexpr (sizeof(run) == sizeof(uint4)) {
    store_vectors(address, run);
  } else {
    static_assert(sizeof(run) == sizeof(uint2));
    uint2 piece;
    memcpy(&piece, run.value, sizeof(piece));
    __stcs(reinterpret_cast<uint2*>(address), piece);
  }
}

// Bfloat16 goes by words: a shift and a mask for two elements.
template <typename Storage, int kCount>
__device__ __forceinline__ void widen(const Run<Storage, kCount>& run, float (&out)[kCount]) {
  if constexpr (std::is_same_v<Storage, BFloat16> && kCount % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      uint32_t word;
      memcpy(&word, run.value + i, sizeof(word));
      out[i] = bits_to_float(word << 16);
      out[i + 1] = bits_to_float(word & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = to_float(run.value[i]);
  }
}

// Rounds a pair to nearest even and packs it: one instruction on the device for the two-byte types.
template <typename Storage>
__device__ __forceinline__ void narrow_pair(float low, float high, Storage* out) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(out, &pair, sizeof(pair));
  } else if constexpr (std::is_same_v<Storage, Float16>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(out, &pair, sizeof(pair));
  } else
#endif
  {
    from_float(low, out[0]);
    from_float(high, out[1]);
  }
}

template <typename Storage, int kCount>
__device__ __forceinline__ Run<Storage, kCount> narrow(const float (&in)[kCount]) {
  static_assert(kCount % 2 == 0);
  Run<Storage, kCount> run;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) narrow_pair(in[i], in[i + 1], run.value + i);
  return run;
}

}  // namespace tilewise
