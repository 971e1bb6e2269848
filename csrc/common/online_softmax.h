// Row statistics that stream: each can be updated tile by tile and merged in any order.
#pragma once

#include "common/vexp.h"

namespace tilewise {

// Statistics of a row x against coefficients c, all relative to the running maximum m so that nothing
// cancels at large |x|:  sum = sum e^(x-m),  mass = sum c,  cross = sum c (x-m),  spread = sum e^(x-m) (x-m).
// mass, cross and spread stay 0 where an operator does not ask for them.
template <typename T>
struct SoftmaxStats {
  T max = -infinity<T>();
  T sum = 0;
  T mass = 0;
  T cross = 0;
  T spread = 0;
  int64_t argmax = 0;
};

// Moves the statistics to a maximum >= stats.max. A row that has seen only -inf has nothing to move.
template <typename T>
TILEWISE_FN void rebase(SoftmaxStats<T>& stats, T max) {
  if (stats.max == max) return;
  const T shift = stats.max - max;  // <= 0, -inf on the first tile
  if (stats.sum > T(0)) {
    const T scale = fast_exp(shift);
    stats.spread = scale > T(0) ? scale * (stats.spread + shift * stats.sum) : T(0);
    stats.sum *= scale;
  }
  if (stats.mass != T(0) && stats.max > -infinity<T>()) stats.cross += shift * stats.mass;
  stats.max = max;
}

// Merges b into a; the lower index wins a tie of the maximum.
template <typename T>
TILEWISE_FN void merge(SoftmaxStats<T>& a, SoftmaxStats<T> b) {
  const bool take = b.max > a.max || (b.max == a.max && b.argmax < a.argmax);
  a.argmax = take ? b.argmax : a.argmax;
  const T max = a.max > b.max ? a.max : b.max;
  rebase(a, max);
  rebase(b, max);
  a.sum += b.sum;
  a.mass += b.mass;
  a.cross += b.cross;
  a.spread += b.spread;
}

// Mean and sum of squared deviations of `count` values (Welford; merged by Chan's formula).
template <typename T>
struct MomentStats {
  T count = 0;
  T mean = 0;
  T m2 = 0;
};

template <typename T>
TILEWISE_FN void merge(MomentStats<T>& a, const MomentStats<T>& b) {
  if (b.count == T(0)) return;
  const T count = a.count + b.count;
  const T delta = b.mean - a.mean;
  const T share = b.count / count;
  a.mean += delta * share;
  a.m2 += b.m2 + delta * delta * a.count * share;
  a.count = count;
}

}  // namespace tilewise
