// Costs of pairs, the same text for CPU and CUDA. A cost of points is a sum over features that is finished once:
//
//   accumulate(z, x, y)   z with one more feature; T is a number or a vector of the CPU
//   finish(z)             the cost
//   slope(p, z)           p (dz/dx) / (x - y), p a weight of the pair
//
// A new one is a struct in the list here, a function of triton_kernels/pairs.py and one of pysrc/reference.
#pragma once

#include <type_traits>

#include "common/platform.h"

namespace tilewise {

// z is given.
struct MatrixCost {
  static constexpr const char* kName = "matrix";
  static constexpr bool kByProducts = false;
  template <typename T>
  static TILEWISE_METHOD T slope(T p, T) {
    return p;
  }
};

// |x - y|^2. Of many features it is |x|^2 + |y|^2 - 2 <x, y>: kByProducts lets engines form z = <x, y> instead.
struct SquaredEuclidean {
  static constexpr const char* kName = "sqeuclidean";
  static constexpr bool kByProducts = true;
  template <typename T>
  static TILEWISE_METHOD T accumulate(T z, T x, T y) {
    const T difference = x - y;
    return z + difference * difference;
  }
  template <typename T>
  static TILEWISE_METHOD T finish(T z) {
    return z;
  }
  template <typename T>
  static TILEWISE_METHOD T slope(T p, T) {
    return 2 * p;
  }
};

// |x - y|; where it is 0 it has no slope.
struct Euclidean {
  static constexpr const char* kName = "euclidean";
  static constexpr bool kByProducts = false;
  template <typename T>
  static TILEWISE_METHOD T accumulate(T z, T x, T y) {
    return SquaredEuclidean::accumulate(z, x, y);
  }
  template <typename T>
  static TILEWISE_METHOD T finish(T z) {
    if constexpr (sizeof(T) == sizeof(float)) {
      return __builtin_sqrtf(z);
    } else {
      return __builtin_sqrt(z);
    }
  }
  template <typename T>
  static TILEWISE_METHOD T slope(T p, T z) {
    return z > 0 ? p / z : T{};
  }
};

template <typename... Costs>
struct CostList {};
using PairCosts = CostList<MatrixCost, SquaredEuclidean, Euclidean>;

template <typename Cost>
inline constexpr bool kIsMatrix = std::is_same_v<Cost, MatrixCost>;

// Calls f, of the host or the device, with the cost at a place of the list.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <typename Function, typename First, typename... More>
TILEWISE_FN auto with_cost(int32_t place, const Function& f, CostList<First, More...>) {
  if constexpr (sizeof...(More) > 0) {
    if (place > 0) return with_cost(place - 1, f, CostList<More...>{});
  }
  return f(First{});
}

#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <typename Function>
TILEWISE_FN auto with_cost(int32_t place, const Function& f) {
  return with_cost(place, f, PairCosts{});
}

}  // namespace tilewise
