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

// Elements in one 16-byte vector.
template <typename Storage>
inline constexpr int kVector = 16 / sizeof(Storage);

__device__ __forceinline__ bool is_vector_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

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

template <typename Storage, int kCount>
__device__ __forceinline__ void widen(const Run<Storage, kCount>& run, float (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = to_float(run.value[i]);
}

// Rounds to nearest even; in pairs on the device, where one instruction converts and packs two.
template <typename Storage, int kCount>
__device__ __forceinline__ Run<Storage, kCount> narrow(const float (&in)[kCount]) {
  Run<Storage, kCount> run;
#if defined(__CUDA_ARCH__)
  if constexpr (kCount % 2 == 0 && sizeof(Storage) == 2) {
    using Pair = std::conditional_t<std::is_same_v<Storage, BFloat16>, __nv_bfloat162, __half2>;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      Pair pair;
      if constexpr (std::is_same_v<Storage, BFloat16>) {
        pair = __floats2bfloat162_rn(in[i], in[i + 1]);
      } else {
        pair = __floats2half2_rn(in[i], in[i + 1]);
      }
      memcpy(run.value + i, &pair, sizeof(pair));
    }
    return run;
  }
#endif
#pragma unroll
  for (int i = 0; i < kCount; ++i) from_float(in[i], run.value[i]);
  return run;
}

}  // namespace tilewise
