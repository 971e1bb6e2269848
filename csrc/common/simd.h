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

// Of fewer numbers than a vector has: the bits of the count are pieces of known sizes, where memcpy would be called.
template <typename T, int64_t kPiece = kLanes<T> / 2>
TILEWISE_FN void copy_some(const T* from, int64_t count, T* to) {
  const bool has = (count & kPiece) != 0;
  if (has) std::memcpy(to, from, kPiece * sizeof(T));
  if constexpr (kPiece > 1) copy_some<T, kPiece / 2>(has ? from + kPiece : from, count, has ? to + kPiece : to);
}

// `rest` behind them.
template <typename T>
TILEWISE_FN Vector<T> load_some(const T* from, int64_t count, T rest = T(0)) {
  T lanes[kLanes<T>];
  store_vector(Vector<T>{} + rest, lanes);
  copy_some(from, count, lanes);
  return load_vector(lanes);
}

template <typename T>
TILEWISE_FN void store_some(Vector<T> vector, int64_t count, T* to) {
  T lanes[kLanes<T>];
  store_vector(vector, lanes);
  copy_some(lanes, count, to);
}

// f of vector after vector of x. The last overlaps the one before it, where `beyond` stands for what that had.
template <typename T, typename Function>
TILEWISE_FN void each_vector(const T* x, int64_t n, T beyond, const Function& f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) f(load_vector(x + i));
  if (i == n) return;
  if (i > 0) {
    Vector<T> lane;
    for (int64_t l = 0; l < kLanes<T>; ++l) lane[l] = static_cast<T>(l);
    return f(lane < static_cast<T>(kLanes<T> - (n - i)) ? Vector<T>{} + beyond : load_vector(x + n - kLanes<T>));
  }
  f(load_some(x, n, beyond));
}

template <typename T>
TILEWISE_FN T lane_sum(Vector<T> v) {
  T lanes[kLanes<T>], sum = 0;
  store_vector(v, lanes);
#pragma omp simd reduction(+ : sum)
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) sum += lanes[lane];
  return sum;
}

template <typename T>
TILEWISE_FN T lane_max(Vector<T> v) {
  T lanes[kLanes<T>], max = v[0];
  store_vector(v, lanes);
#pragma omp simd reduction(max : max)
  for (int64_t lane = 1; lane < kLanes<T>; ++lane) max = lanes[lane] > max ? lanes[lane] : max;
  return max;
}

}  // namespace tilewise::TILEWISE_ISA
#endif
