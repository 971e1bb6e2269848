// Row statistics that stream: each can be updated tile by tile and merged in any order.
#pragma once

#include "common/math.h"

namespace tilewise {

// Statistics of a row x against coefficients c, all relative to the running maximum m so that nothing cancels at large
// |x|:
//
//   sum = sum e^(x-m) - 1    weight_sum = sum c    weighted_dot = sum c (x-m)    exp_dot = sum e^(x-m) (x-m)
//
// The maximum's own 1 stays out of sum: of a confident row the other terms are far below 1 and would keep few digits
// beside it. weight_sum, weighted_dot and exp_dot are 0 where they are not requested.
template <typename T>
struct SoftmaxStats {
  T max = -infinity<T>();
  T sum = 0;
  T weight_sum = 0;
  T weighted_dot = 0;
  T exp_dot = 0;
  int64_t argmax = 0;
};

// Expresses the statistics relative to max >= stats.max. A row that has seen only -inf has nothing to move.
template <typename T>
TILEWISE_FN void rebase(SoftmaxStats<T>& stats, T max) {
  if (stats.max == max) return;
  const T shift = stats.max - max;  // <= 0, -inf on the first tile
  if (stats.sum > T(0)) {
    const T scale = fast_exp(shift);
    stats.exp_dot = scale > T(0) ? scale * (stats.exp_dot + shift * stats.sum) : T(0);
    stats.sum *= scale;
  }
  if (stats.weight_sum != T(0) && stats.max > -infinity<T>()) stats.weighted_dot += shift * stats.weight_sum;
  stats.max = max;
}

// Merges b into a: the smaller maximum joins the sum. The lower index wins a tie.
template <typename T>
TILEWISE_FN void merge(SoftmaxStats<T>& a, SoftmaxStats<T> b) {
  const bool take = b.max > a.max || (b.max == a.max && b.argmax < a.argmax);
  a.argmax = take ? b.argmax : a.argmax;
  const T max = a.max > b.max ? a.max : b.max;
  const T joining = a.max > b.max ? b.max : a.max;
  rebase(a, max);
  rebase(b, max);
  a.sum += b.sum;
  a.weight_sum += b.weight_sum;
  a.weighted_dot += b.weighted_dot;
  a.exp_dot += b.exp_dot;
  if (joining == -infinity<T>()) return;
  const T e = fast_exp(joining - max);
  a.sum += e;
  a.exp_dot += e > T(0) ? e * (joining - max) : T(0);
}

// log sum e^(x-m) of the whole row: -inf of a row of -inf, NaN of one that holds inf or NaN.
template <typename T>
TILEWISE_FN T log_sum(const SoftmaxStats<T>& stats) {
  if (stats.max == -infinity<T>()) return natural_log(stats.sum);
  const T sum = stats.sum + (stats.max - stats.max);
  return sum > T(1) ? natural_log(T(1) + sum) : natural_log1p(sum);
}

// A power of two that brings the largest values of a type to where their squares can be summed, and the deviation above
// which that is needed.
template <typename T>
struct MomentRange;
template <>
struct MomentRange<float> {
  static constexpr float scale = 0x1p-96f, most = 0x1p48f;
};
template <>
struct MomentRange<double> {
  static constexpr double scale = 0x1p-768, most = 0x1p384;
};

// Mean and sum of squared deviations of `count` values times `scale` (Welford; merged by Chan's formula).
template <typename T>
struct MomentStats {
  T count = 0;
  T mean = 0;
  T m2 = 0;
  T scale = 1;
};

template <typename T>
TILEWISE_FN void shrink(MomentStats<T>& stats) {
  constexpr T scale = MomentRange<T>::scale;
  if (stats.scale == scale) return;
  stats = {stats.count, stats.mean * scale, stats.m2 * scale * scale, scale};
}

template <typename T>
TILEWISE_FN void merge(MomentStats<T>& a, MomentStats<T> b) {
  if (b.count == T(0)) return;
  if (a.count == T(0)) {
    a = b;
    return;
  }
  if (a.scale != b.scale || !(::fabs(b.mean - a.mean) < MomentRange<T>::most)) {
    shrink(a);
    shrink(b);
  }
  const T count = a.count + b.count;
  const T delta = b.mean - a.mean;
  const T share = b.count / count;
  a.mean += delta * share;
  a.m2 += b.m2 + delta * delta * a.count * share;
  a.count = count;
}

}  // namespace tilewise
