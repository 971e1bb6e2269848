// The k largest numbers of a row, and the threshold at which they sum to a total, by a team of threads (CUDA). A row is
// read again for every count; short rows stay in the first-level cache, long ones in the second.
#pragma once

#include "common/team.cuh"
#include "simplex_topk/simplex_topk.h"

namespace tilewise {

// x - minus, or x.
struct Scores {
  const float* x;
  const float* minus;

  __device__ __forceinline__ float operator()(int64_t i) const { return minus == nullptr ? x[i] : x[i] - minus[i]; }
};

// Which entries of a row count, and what of them: [s - top - below]_+ where s > level, or s == equal up to index last.
// A row with NaN, or without a finite largest, has top = NaN.
struct Cut {
  float level;
  float equal;
  float top;
  float below;
  int64_t last;

  __device__ __forceinline__ bool keeps(float s, int64_t i) const { return s > level || (s == equal && i <= last); }
  __device__ __forceinline__ float mass(float s, int64_t i) const {
    const float above = s - top - below;
    return keeps(s, i) && above > 0.0f ? above : 0.0f;
  }
};

// How many scores are above four rising levels, two counts to a number.
__device__ __forceinline__ void count_above(const Team& team, const Scores& scores, int64_t size,
                                            const float (&levels)[4], int64_t (&counts)[4]) {
  int64_t low = 0, high = 0;
  for (int64_t i = team.rank(); i < size; i += team.size()) {
    const float s = scores(i);
    low += (static_cast<int64_t>(s > levels[1]) << 32) + (s > levels[0]);
    high += (static_cast<int64_t>(s > levels[3]) << 32) + (s > levels[2]);
  }
  low = team.all_sum(low);
  high = team.all_sum(high);
  counts[0] = low & 0xffffffff;
  counts[1] = low >> 32;
  counts[2] = high & 0xffffffff;
  counts[3] = high >> 32;
}

// The index of the `quota`-th score that is `equal`.
__device__ __forceinline__ int64_t index_of(const Team& team, const Scores& scores, int64_t size, float equal,
                                            int64_t quota) {
  int64_t first = 0, last = size - 1;
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    int64_t count = 0;
    for (int64_t i = team.rank(); i <= middle; i += team.size()) count += scores(i) == equal;
    if (team.all_sum(count) >= quota) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  return last;
}

// The cut of the k largest that sum to `total`; with `fixed` the threshold is given instead, `tau`.
__device__ __forceinline__ Cut find_cut(const Team& team, const Scores& scores, int64_t size, int64_t k, float total,
                                        bool fixed, float tau) {
  float top = -infinity<float>();
  int32_t wrong = 0;
  for (int64_t i = team.rank(); i < size; i += team.size()) {
    const float s = scores(i);
    top = fmaxf(top, s);
    wrong += s != s;
  }
  top = team.all(top, [](float a, float b) { return fmaxf(a, b); });
  if (team.all_sum(wrong) > 0 || !(top < infinity<float>() && top > -infinity<float>())) top = quiet_nan<float>();
  // A little below where the largest would have the total alone: what is too low gets nothing in the end.
  Cut cut{fixed ? tau : top - total - fabsf(top) * 1.1920929e-7f, quiet_nan<float>(), top, 0.0f, -1};

  // The k-th largest is in (level, high]; `inside` are above level, `above` < k above high.
  float high = top;
  int64_t inside = 0, above = 0;
  for (int64_t i = team.rank(); i < size; i += team.size()) inside += scores(i) > cut.level;
  inside = team.all_sum(inside);
  while (inside > k) {
    float levels[4];
    bool between = false;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      levels[j] = level_between(cut.level, high, 0.2f * static_cast<float>(j + 1));
      between = between || (levels[j] > cut.level && levels[j] < high);
    }
    if (!between) {  // all in (level, high] are high
      cut.level = cut.equal = high;
      cut.last = index_of(team, scores, size, high, k - above);
      break;
    }
    int64_t counts[4];
    count_above(team, scores, size, levels, counts);
    float low = cut.level;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (counts[j] >= k && levels[j] > low) low = levels[j], inside = counts[j];
    }
#pragma unroll
    for (int j = 3; j >= 0; --j) {
      if (counts[j] < k && levels[j] < high) high = levels[j], above = counts[j];
    }
    cut.level = low;
  }

  if (fixed) {
    cut.below = tau - top;
    return cut;
  }
  // Newton's steps from below, where all that is kept counts. Fewer do at every step; where rounding takes one back,
  // one has arrived.
  cut.below = -infinity<float>();
  const float part = 1.0f / static_cast<float>(k);  // sums stay in the range of the type whatever the scores are
  for (int64_t active = 0;;) {
    float sum = 0.0f;
    int64_t count = 0;
    for (int64_t i = team.rank(); i < size; i += team.size()) {
      const float s = scores(i);
      if (!cut.keeps(s, i) || !(s - top > cut.below)) continue;
      sum += (s - top) * part;
      ++count;
    }
    sum = team.all_sum(sum);
    count = team.all_sum(count);
    if (count == 0 || (active > 0 && count >= active)) return cut;
    active = count;
    cut.below = (sum - total * part) / (static_cast<float>(count) * part);
  }
}

}  // namespace tilewise
