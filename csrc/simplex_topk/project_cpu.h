// The k largest numbers of a row, and the threshold at which they sum to a total (CPU).
#pragma once

#include <bit>
#include <limits>

#if defined(__SSE2__)
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

// Bit l is set where lane l is above `level`, or NaN.
template <typename T>
TILEWISE_FN uint32_t lanes_above(Vector<T> v, T level) {
  constexpr bool kFloat = sizeof(T) == sizeof(float);
  const Vector<T> levels = Vector<T>{} + level;
#if defined(__AVX512F__)
  if constexpr (kFloat) return _mm512_cmp_ps_mask((__m512)v, (__m512)levels, _CMP_NLE_UQ);
  if constexpr (!kFloat) return _mm512_cmp_pd_mask((__m512d)v, (__m512d)levels, _CMP_NLE_UQ);
#elif defined(__AVX__)
  if constexpr (kFloat) return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)levels, _CMP_NLE_UQ));
  if constexpr (!kFloat) return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, (__m256d)levels, _CMP_NLE_UQ));
#elif defined(__SSE2__)
  if constexpr (kFloat) return _mm_movemask_ps(_mm_cmpnle_ps((__m128)v, (__m128)levels));
  if constexpr (!kFloat) return _mm_movemask_pd(_mm_cmpnle_pd((__m128d)v, (__m128d)levels));
#else
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) bits |= static_cast<uint32_t>(!(v[lane] <= level)) << lane;
  return bits;
#endif
}

// x - minus (x if null) from `i` on, -inf beyond the last.
template <typename T>
TILEWISE_FN Vector<T> scores_at(int64_t size, const T* x, const T* minus, int64_t i) {
  if (i + kLanes<T> <= size) return minus != nullptr ? load_vector(x + i) - load_vector(minus + i) : load_vector(x + i);
  Vector<T> v = Vector<T>{} - infinity<T>();
  for (int64_t lane = 0; lane < size - i; ++lane)
    v[lane] = minus != nullptr ? x[i + lane] - minus[i + lane] : x[i + lane];
  return v;
}

// The scores x - minus (x if null) that are above `level`, or NaN, in order, and where; `top` becomes the largest of
// all. It ends where there are more than `limit`. Of 64 lanes few are: the first of them are written without a branch.
template <typename T>
static int64_t gather_above(int64_t size, const T* x, const T* minus, T level, int64_t limit, T* values, int64_t* where,
                            T& top) {
  constexpr int64_t kWord = 64, kFew = 4;
  Vector<T> most = Vector<T>{} - infinity<T>();
  int64_t count = 0;
  for (int64_t i = 0; i < size && count <= limit; i += kWord) {
    uint64_t bits = 0;
    const auto look = [&](int64_t lane) {
      const Vector<T> v = scores_at(size, x, minus, i + lane);
      most = v > most ? v : most;
      bits |= static_cast<uint64_t>(lanes_above<T>(v, level)) << lane;
    };
    if (i + kWord <= size) {
#pragma GCC unroll 32
      for (int64_t lane = 0; lane < kWord; lane += kLanes<T>) look(lane);
    } else {
      for (int64_t lane = 0; lane < size - i; lane += kLanes<T>) look(lane);
    }
    const int64_t end = count + std::popcount(bits);
    const auto take = [&](int64_t place) {
      where[place] = i + std::countr_zero(bits);
      bits &= bits - 1;
    };
    for (int64_t place = count; place < count + kFew; ++place) take(place);
    for (int64_t place = count + kFew; place < end; ++place) take(place);
    count = end;
  }
  for (int64_t i = 0; i < count; ++i) values[i] = minus != nullptr ? x[where[i]] - minus[where[i]] : x[where[i]];
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) top = most[lane] > top ? most[lane] : top;
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

// A little below where the largest would have the total alone: what is too low gets nothing in the end.
template <typename T>
static T lowest(T top, T total) {
  return top - total - (top < 0 ? -top : top) * std::numeric_limits<T>::epsilon();
}

template <typename T>
struct Largest {
  int64_t count;  // in scratch, in order of their index
  T top;          // NaN where there is a NaN, or no finite largest
  T low;          // low_of(top)
};

// The k largest scores x - minus (x if null) of those above `low_of` the largest. `hint` is a little below where the
// last of them may lie, or NaN, and becomes that of these: if it is right, one pass over the row does it. Without a
// hint the scratch holds all scores, too.
template <typename T, typename LowOf>
static Largest<T> keep_largest(const ProjectScratch<T>& scratch, int64_t size, const T* x, const T* minus, int64_t k,
                               const LowOf& low_of, T& hint) {
  Largest<T> largest{0, -infinity<T>(), quiet_nan<T>()};
  Bracket<T> bracket{hint, quiet_nan<T>(), 0, 0};
  const int64_t limit = k + (k > 128 ? k / 2 : 64);
  bool there = false;
  if (hint == hint) {
    const int64_t most = 2 * limit;
    largest.count = gather_above(size, x, minus, hint, most, scratch.values, scratch.where, largest.top);
    largest.low = low_of(largest.top);
    int wrong = !(largest.top < infinity<T>()) || largest.count > most;
    for (int64_t i = 0; i < largest.count; ++i) wrong |= scratch.values[i] != scratch.values[i];
    there = !wrong && (largest.count >= k || !(hint > largest.low));
  }
  if (!there) {
    const Range<T> range = stage(size, x, minus, scratch.scores);
    if (!is_usable(range)) return {0, quiet_nan<T>(), quiet_nan<T>()};
    largest = {0, range.top, low_of(range.top)};
    const int64_t padded = pad(scratch.scores, size);
    bracket = {largest.low, range.top, size, 0};
    if (!(range.bottom > largest.low)) count_above<T, 1>(scratch.scores, padded, &largest.low, &bracket.inside);
    if (hint == hint && bracket.inside > limit) {  // the k-th has moved, but as a rule not far
      const T guess = (16 * hint + range.top) / 17, width = (range.top - bracket.low) / 128;
      const T levels[] = {guess - 4 * width, guess - width, guess - width / 8, guess + width};
      narrow_once<T, 4>(scratch.scores, padded, k, levels, bracket);
    }
    narrow(scratch.scores, padded, k, limit, bracket);
    T top = range.top;
    largest.count =
        gather_above<T>(padded, scratch.scores, nullptr, bracket.low, padded, scratch.values, scratch.where, top);
  } else {
    bracket = {hint, largest.top, largest.count, 0};
    if (!(hint > largest.low)) {
      bracket.low = largest.low;
      count_above<T, 1>(scratch.values, pad(scratch.values, largest.count), &largest.low, &bracket.inside);
    }
  }
  if (bracket.inside > k) narrow(scratch.values, pad(scratch.values, largest.count), k, k, bracket);
  hint = bracket.low - (largest.top - bracket.low) / 16;
  if (largest.count <= k && bracket.inside == largest.count) return largest;
  const bool ties = bracket.inside > k;  // all in (low, high] are high
  int64_t equal = k - bracket.above, kept = 0;
  for (int64_t i = 0; i < largest.count; ++i) {
    const T value = scratch.values[i];
    bool keep = value > (ties ? bracket.high : bracket.low);
    if (ties && value == bracket.high) keep = equal-- > 0;
    scratch.values[kept] = value;
    scratch.where[kept] = scratch.where[i];
    kept += keep;
  }
  largest.count = kept;
  return largest;
}

// tau - top, with sum [v - tau]_+ = total, by Newton's steps from below, where all are above it. Fewer count at every
// step; where rounding takes one back, one has arrived.
template <typename T>
static T threshold(T* values, int64_t count, T total, T top) {
  constexpr int64_t kWide = kLanes<double>;
  using Part [[gnu::vector_size(kWide * sizeof(T))]] = T;
  using Mask = decltype(Vector<double>{} > Vector<double>{});
  const int64_t padded = pad(values, count);
  T below = -infinity<T>();
  for (int64_t active = 0;;) {
    Vector<double> sums = {};
    Mask counts = {};
    for (int64_t i = 0; i < padded; i += kWide) {
      Part value;
      std::memcpy(&value, values + i, sizeof(value));
      value -= top;
      const Mask counted = __builtin_convertvector(value > below, Mask);
      sums += counted ? __builtin_convertvector(value, Vector<double>) : Vector<double>{};
      counts -= counted;
    }
    double sum = 0.0;
    int64_t above = 0;
    for (int64_t lane = 0; lane < kWide; ++lane) sum += sums[lane], above += counts[lane];
    if (above == 0 || (active > 0 && above >= active)) return below;
    active = above;
    below = static_cast<T>((sum - static_cast<double>(total)) / static_cast<double>(above));
  }
}

}  // namespace tilewise::TILEWISE_ISA
#endif
