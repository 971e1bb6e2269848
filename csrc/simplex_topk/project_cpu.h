// The k largest numbers of a row, and the threshold at which they sum to a total (CPU).
#pragma once

#include <bit>
#include <limits>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "common/simd.h"
#include "simplex_topk/simplex_topk.h"

#if defined(TILEWISE_ISA)
namespace tilewise::TILEWISE_ISA {

constexpr int kLevels = 8;  // counted in one pass

// counts[j] = how many of s are above levels[j]; size is a multiple of a vector, as -inf is never above.
template <typename T, int kCount>
static void count_above(const T* s, int64_t size, const T* levels, int64_t* counts) {
  using Mask = decltype(Vector<T>{} > Vector<T>{});
  Mask sums[kCount] = {};
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    const Vector<T> v = load_vector(s + i);
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) sums[j] += v > levels[j];  // -1 where it is
  }
  for (int j = 0; j < kCount; ++j) {
    counts[j] = 0;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) counts[j] -= sums[j][lane];
  }
}

// The k-th largest number is in (low, high]: `inside` >= k are above low, `above` < k above high.
template <typename T>
struct Bracket {
  T low;
  T high;
  int64_t inside;
  int64_t above;
};

// Counts above rising levels, and narrows to two neighbours of them. Whether any lay between low and high.
template <typename T, int kCount>
static bool narrow_once(const T* s, int64_t size, int64_t k, const T* levels, Bracket<T>& bracket) {
  bool between = false;
  for (int j = 0; j < kCount; ++j) between = between || (levels[j] > bracket.low && levels[j] < bracket.high);
  if (!between) return false;
  int64_t counts[kCount];
  count_above<T, kCount>(s, size, levels, counts);
  for (int j = 0; j < kCount; ++j) {
    if (counts[j] >= k && levels[j] > bracket.low) bracket.low = levels[j], bracket.inside = counts[j];
  }
  for (int j = kCount - 1; j >= 0; --j) {
    if (counts[j] < k && levels[j] < bracket.high) bracket.high = levels[j], bracket.above = counts[j];
  }
  return true;
}

// Narrows until at most `limit` >= k are above low, or until nothing lies between low and high.
template <typename T>
static void narrow(const T* s, int64_t size, int64_t k, int64_t limit, Bracket<T>& bracket) {
  while (bracket.inside > limit) {
    T levels[kLevels];
    for (int j = 0; j < kLevels; ++j) {
      levels[j] = level_between(bracket.low, bracket.high, static_cast<T>(j + 1) / (kLevels + 1));
    }
    if (!narrow_once<T, kLevels>(s, size, k, levels, bracket)) return;
  }
}

// Bit l is set where lane l is above `level`.
template <typename T>
static uint32_t lanes_above(const T* s, T level) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(s), _mm512_set1_ps(level), _CMP_GT_OQ);
  } else {
    return _mm512_cmp_pd_mask(_mm512_loadu_pd(s), _mm512_set1_pd(level), _CMP_GT_OQ);
  }
#elif defined(__AVX__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(s), _mm256_set1_ps(level), _CMP_GT_OQ));
  } else {
    return _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(s), _mm256_set1_pd(level), _CMP_GT_OQ));
  }
#else
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) bits |= static_cast<uint32_t>(s[lane] > level) << lane;
  return bits;
#endif
}

// What is above `level`, in order, and where. Of 64 lanes few are: the first of them are written without a branch.
template <typename T>
static int64_t gather_above(const T* s, int64_t size, T level, T* values, int64_t* where) {
  constexpr int64_t kWord = 64, kFew = 4;
  int64_t count = 0;
  for (int64_t i = 0; i < size; i += kWord) {
    const int64_t lanes = size - i < kWord ? size - i : kWord;
    uint64_t bits = 0;
    for (int64_t lane = 0; lane < lanes; lane += kLanes<T>)
      bits |= static_cast<uint64_t>(lanes_above(s + i + lane, level)) << lane;
    const int64_t end = count + std::popcount(bits);
    const auto take = [&](int64_t place) {
      where[place] = i + std::countr_zero(bits);
      bits &= bits - 1;
    };
    for (int64_t place = count; place < count + kFew; ++place) take(place);
    for (int64_t place = count + kFew; place < end; ++place) take(place);
    count = end;
  }
  for (int64_t i = 0; i < count; ++i) values[i] = s[where[i]];
  return count;
}

// The row's vectors end in -inf.
template <typename T>
static int64_t pad(T* s, int64_t size) {
  const int64_t padded = (size + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  for (int64_t i = size; i < padded; ++i) s[i] = -infinity<T>();
  return padded;
}

template <typename T>
struct Range {
  T bottom;
  T top;
  bool numbers;  // none is NaN
};

// Whether the largest can be projected from: without, all there is to say is NaN.
template <typename T>
static bool is_usable(const Range<T>& range) {
  return range.numbers && infinity<T>() > range.top && -infinity<T>() < range.top;
}

// Scores x - minus (x if null), and their range.
template <typename T>
static Range<T> stage(int64_t size, const T* x, const T* minus, T* scores) {
  Vector<T> bottom = Vector<T>{} + infinity<T>(), top = -bottom;
  auto wrong = bottom != bottom;
  const auto take = [&](const Vector<T>& v, int64_t i) {
    store_vector(v, scores + i);
    bottom = v < bottom ? v : bottom;
    top = v > top ? v : top;
    wrong |= v != v;
  };
  const int64_t whole = size / kLanes<T> * kLanes<T>;
  for (int64_t i = 0; i < whole; i += kLanes<T>)
    take(minus != nullptr ? load_vector(x + i) - load_vector(minus + i) : load_vector(x + i), i);
  if (whole < size) {  // the rest repeats its first number
    Vector<T> v = Vector<T>{} + (minus != nullptr ? x[whole] - minus[whole] : x[whole]);
    for (int64_t i = whole + 1; i < size; ++i) v[i - whole] = minus != nullptr ? x[i] - minus[i] : x[i];
    take(v, whole);
  }
  Range<T> range{bottom[0], top[0], true};
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
    range.bottom = bottom[lane] < range.bottom ? bottom[lane] : range.bottom;
    range.top = top[lane] > range.top ? top[lane] : range.top;
    range.numbers = range.numbers && wrong[lane] == 0;
  }
  return range;
}

// Keeps the k largest of those above `low`, in order of their index; how many they are. NaN is never kept. `hint` is
// about where the k-th lies, or NaN; it becomes what it was found to be.
template <typename T>
static int64_t keep_largest(const ProjectScratch<T>& scratch, int64_t size, int64_t k, T low, Range<T> range, T& hint) {
  const int64_t padded = pad(scratch.scores, size);
  Bracket<T> bracket{low, range.top, size, 0};
  if (!(range.bottom > low)) count_above<T, 1>(scratch.scores, padded, &low, &bracket.inside);
  const int64_t limit = k + (k > 128 ? k / 2 : 64);
  if (bracket.inside > limit) {
    if (hint == hint) {
      const T width = (range.top - (range.bottom > low ? range.bottom : low)) / 128;
      const T levels[] = {hint - 4 * width, hint - width, hint - width / 8, hint + width};
      narrow_once<T, 4>(scratch.scores, padded, k, levels, bracket);
    }
    narrow(scratch.scores, padded, k, limit, bracket);
  }
  int64_t count = gather_above(scratch.scores, padded, bracket.low, scratch.values, scratch.where);
  if (count <= k) return count;
  narrow(scratch.values, pad(scratch.values, count), k, k, bracket);
  hint = bracket.low;
  const bool ties = bracket.inside > k;  // all in (low, high] are high
  int64_t equal = k - bracket.above, kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T value = scratch.values[i];
    bool keep = value > (ties ? bracket.high : bracket.low);
    if (ties && value == bracket.high) keep = equal-- > 0;
    scratch.values[kept] = value;
    scratch.where[kept] = scratch.where[i];
    kept += keep;
  }
  return kept;
}

// A little below where the largest would have the total alone: what is too low gets nothing in the end.
template <typename T>
static T lowest(T top, T total) {
  return top - total - (top < 0 ? -top : top) * std::numeric_limits<T>::epsilon();
}

// tau - top, with sum [v - tau]_+ = total, by Newton's steps from below, where all are above it. Fewer count at every
// step; where rounding takes one back, one has arrived.
template <typename T>
static T threshold(const T* values, int64_t count, T total, T top) {
  T below = -infinity<T>();
  for (int64_t active = 0;;) {
    double sum = 0.0;
    int64_t above = 0;
#pragma omp simd reduction(+ : sum, above)
    for (int64_t i = 0; i < count; ++i) {
      const T value = values[i] - top;
      sum += static_cast<double>(value > below ? value : T(0));
      above += value > below ? 1 : 0;
    }
    if (above == 0 || (active > 0 && above >= active)) return below;
    active = above;
    below = static_cast<T>((sum - static_cast<double>(total)) / static_cast<double>(above));
  }
}

}  // namespace tilewise::TILEWISE_ISA
#endif
