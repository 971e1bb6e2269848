// Vectors as wide as the instruction set that a file is compiled for, with the operators of the language.
#pragma once

#include <cstring>

#include "common/platform.h"

#if defined(TILEWISE_ISA)
namespace tilewise::TILEWISE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <typename T>
using Vector [[gnu::vector_size(kVectorBytes)]] = T;
template <typename T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);

// Any alignment.
template <typename T>
TILEWISE_FN Vector<T> load_vector(const T* from) {
  Vector<T> result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}

template <typename V, typename T>
TILEWISE_FN void store_vector(V vector, T* to) {
  std::memcpy(to, &vector, sizeof(vector));
}

}  // namespace tilewise::TILEWISE_ISA
#endif
