// The k largest scores of a row, and the threshold at which they sum to a total, by a team of threads (CUDA). Both are
// found by passes over the scores, which count and sum and never sort. Scores lie in registers of a warp where a row is
// short, else in shared memory or in memory (long_rows.cuh); a source has
//
//   kLevels     that are counted in one pass: one is the fewest instructions, several the fewest passes
//   pass(f)     f(s) for every score that this thread has; s may be -inf where it has none
#pragma once

#include <type_traits>

#include "common/dtype.h"
#include "common/team.cuh"
#include "simplex_topk/simplex_topk.h"

namespace tilewise {

using Count = uint32_t;  // of the scores of a row: it has fewer than 2^32

constexpr int64_t kMostInRegisters = 1024;  // scores of a row

// Scores are those of a row, or differences of two.
struct Row {
  const float* x;

  __device__ __forceinline__ float operator()(int64_t i) const { return x[i]; }
};

struct Difference {
  const float* x;
  const float* minus;

  __device__ __forceinline__ float operator()(int64_t i) const { return x[i] - minus[i]; }
};

// Score index(j) of a row is number j of this lane.
template <int kCount>
struct InRegisters {
  static constexpr int kLevels = 1;
  float own[kCount];

  template <typename Scores>
  __device__ __forceinline__ InRegisters(const Scores& scores, int64_t size) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) own[j] = index(j) < size ? scores(index(j)) : -infinity<float>();
  }

  __device__ __forceinline__ static int64_t index(int j) { return j * kWarp + Warp().rank(); }

  template <typename Function>
  __device__ __forceinline__ void pass(const Function& f) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) f(own[j]);
  }
};

// launch(std::integral_constant<int, numbers of a lane>) for rows of `size` in registers.
template <typename Launch>
const char* with_registers(int64_t size, const Launch& launch) {
  if (size <= 4 * kWarp) return launch(std::integral_constant<int, 4>{});
  if (size <= 8 * kWarp) return launch(std::integral_constant<int, 8>{});
  if (size <= 16 * kWarp) return launch(std::integral_constant<int, 16>{});
  static_assert(kMostInRegisters == 32 * kWarp);
  return launch(std::integral_constant<int, 32>{});
}

// What is sought: the k largest, and the threshold at which they sum to `total`, or with `fixed` a given one, `tau`.
struct Target {
  Count k;
  float total;
  bool fixed;
  float tau;
};

// Which entries of a row count, and what of them: [s - top - below]_+ where s > level, or s == equal up to index last,
// which `quota` are. A row with NaN, or without a finite largest, has top = NaN.
struct Cut {
  float level;
  float equal;
  float top;
  float below;
  int64_t last;
  Count quota;

  __device__ __forceinline__ bool keeps(float s, int64_t i) const {  // without a branch
    return (s > level) | ((s == equal) & (i <= last));
  }
  __device__ __forceinline__ float mass(float s, int64_t i) const {
    const float above = s - top - below;
    return keeps(s, i) && above > 0.0f ? above : 0.0f;
  }
};

struct Range {
  float top;     // NaN where there is a NaN, or no finite largest
  float bottom;  // the least that is not -inf
};

// Unsigned numbers of the same order, and back. The largest of all is a NaN.
__device__ __forceinline__ uint32_t order_of(float x) {
  const uint32_t bits = float_to_bits(x);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ float of_order(uint32_t order) {
  return bits_to_float(order ^ (order >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}

template <typename Team, typename Source>
__device__ __forceinline__ Range range_of(const Team& team, const Source& source) {
  float top = -infinity<float>(), bottom = infinity<float>();
  bool wrong = false;
  source.pass([&](float s) {
    top = fmaxf(top, s);
    bottom = fminf(bottom, s > -infinity<float>() ? s : infinity<float>());
    wrong = wrong || s != s;
  });
  uint32_t ends[] = {wrong ? 0xffffffffu : order_of(top), ~order_of(bottom)};
  team.all_largest(ends);
  top = of_order(ends[0]);
  return {top < infinity<float>() && top > -infinity<float>() ? top : quiet_nan<float>(), of_order(~ends[1])};
}

// The k-th largest is in (low, high]: `inside` are above low, `above` < k above high. Fewer than k inside: all count.
struct Bracket {
  float low;
  float high;
  Count inside;
  Count above;
};

// A little below where the largest would have the total alone: what is too low gets nothing in the end.
__device__ __forceinline__ float lowest(const Target& target, float top) {
  return target.fixed ? target.tau : top - target.total - fabsf(top) * 1.1920929e-7f;
}

template <typename Team, typename Source>
__device__ __forceinline__ Bracket bracket_of(const Team& team, const Source& source, const Range& range, float low) {
  if (range.bottom > low) low = nextafterf(range.bottom, -infinity<float>());
  Count inside[] = {0};
  source.pass([&](float s) { inside[0] += s > low; });
  team.all_sums(inside);
  return {low, range.top, inside[0], 0};
}

// Until at most `limit` >= k are inside, or until there is nothing between low and high: then all of these are high.
template <typename Team, typename Source>
__device__ __forceinline__ void narrow(const Team& team, const Source& source, Count k, Count limit, Bracket& bracket) {
  constexpr int kLevels = Source::kLevels;
  while (bracket.inside > limit) {
    float levels[kLevels];
    bool between = false;
#pragma unroll
    for (int j = 0; j < kLevels; ++j) {
      levels[j] = level_between(bracket.low, bracket.high, static_cast<float>(j + 1) / (kLevels + 1));
      between = between || (levels[j] > bracket.low && levels[j] < bracket.high);
    }
    if (!between) return;
    Count counts[kLevels] = {};
    source.pass([&](float s) {
#pragma unroll
      for (int j = 0; j < kLevels; ++j) counts[j] += s > levels[j];
    });
    team.all_sums(counts);
#pragma unroll
    for (int j = 0; j < kLevels; ++j) {
      if (counts[j] >= k && levels[j] > bracket.low) bracket.low = levels[j], bracket.inside = counts[j];
    }
#pragma unroll
    for (int j = kLevels - 1; j >= 0; --j) {
      if (counts[j] < k && levels[j] < bracket.high) bracket.high = levels[j], bracket.above = counts[j];
    }
  }
}

// The index of the `quota`-th score that is `equal`.
template <typename Team, typename Scores>
__device__ __forceinline__ int64_t index_of(const Team& team, const Scores& scores, int64_t size, float equal,
                                            Count quota) {
  int64_t first = 0, last = size - 1;
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    Count count[] = {0};
#pragma unroll 1
    for (int64_t i = first + team.rank(); i <= middle; i += team.size()) count[0] += scores(i) == equal;
    team.all_sums(count);
    if (count[0] >= quota) {
      last = middle;
    } else {
      first = middle + 1;
      quota -= count[0];
    }
  }
  return last;
}

// tau - top, with sum [s - tau]_+ = total, by Newton's steps from below, where all that is kept counts. Fewer do at
// every step; where rounding takes one back, one has arrived.
template <typename Team, typename Source>
__device__ __forceinline__ float threshold(const Team& team, const Source& source, const Target& target,
                                           const Cut& cut) {
  const float part = 1.0f / static_cast<float>(target.k);  // sums stay in the range of the type whatever the scores are
  const float of_equal = cut.equal - cut.top;
  float below = -infinity<float>();
  for (Count active = 0;;) {
    float sum = 0.0f;
    Count count = 0;
    source.pass([&](float s) {
      if (!(s > cut.level && s - cut.top > below)) return;
      sum += (s - cut.top) * part;
      ++count;
    });
    team.all_sum(sum, count);
    if (of_equal > below) {  // not NaN
      sum += of_equal * (static_cast<float>(cut.quota) * part);
      count += cut.quota;
    }
    if (count == 0 || (active > 0 && count >= active)) return below;
    active = count;
    below = (sum - target.total * part) / (static_cast<float>(active) * part);
  }
}

// The source has the scores of a row in memory, or all that matter of them: the k largest, or all above lowest().
template <typename Team, typename Source, typename Scores>
__device__ __forceinline__ Cut find_cut(const Team& team, const Source& source, const Target& target,
                                        const Scores& scores, int64_t size) {
  const Range range = range_of(team, source);
  Cut cut{quiet_nan<float>(), quiet_nan<float>(), range.top, 0.0f, -1, 0};
  if (range.top != range.top) return cut;
  Bracket bracket = bracket_of(team, source, range, lowest(target, range.top));
  narrow(team, source, target.k, target.k, bracket);
  cut.level = bracket.low;
  if (bracket.inside > target.k) {
    cut.level = cut.equal = bracket.high;
    cut.quota = target.k - bracket.above;
    cut.last = index_of(team, scores, size, cut.equal, cut.quota);
  }
  cut.below = target.fixed ? target.tau - cut.top : threshold(team, source, target, cut);
  return cut;
}

}  // namespace tilewise
