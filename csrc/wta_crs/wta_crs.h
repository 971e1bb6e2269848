// A product sum_i y_i x_i^T over n rows, estimated from k of them. Row i counts by its share p_i of the sizes
// |x_i| |y_i|, mixed with a little uniform share so that 1 / p_i is bounded and no row is left out:
//
//   p_i = (1 - mix) |x_i| |y_i| / sum |x| |y| + mix / n
//
//   kept for certain     C, the largest: as long as p_i >= (1 - P_C) / (k - |C|)                        scale 1
//   drawn from the rest  k - |C| rows, in proportion to p_i            scale (1 - P_C) / ((k - |C|) p_i)
//
// kSystematic draws at equal distances along the running sums of p, from a random start: no row twice. kWta draws with
// replacement, as the paper does; kCrs does so from all rows and keeps none for certain. The estimate is unbiased for
// any p > 0 that does not look at the draw.
//
// p is held in integers, weight_i / sum of weights: their sums are exact in any order, so that a seed means the same
// rows on every backend.
//
// From "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model" (Liu et al., 2023).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace tilewise {

enum class SampleMethod : int32_t { kSystematic, kWta, kCrs };

struct RowSample {
  int64_t batch = 0;
  int64_t rows = 0;
  int64_t k = 0;     // in [1, rows]
  int64_t bits = 0;  // weight_bits(rows, k)
  int64_t mix = 0;   // of 2^kMixBits
  SampleMethod method = SampleMethod::kSystematic;
  const float* x_norms = nullptr;  // (batch, rows)
  const float* y_norms = nullptr;  // likewise, or null: all equal
  const int64_t* seed = nullptr;
  uint32_t* own = nullptr;     // (batch, rows), scratch: of the weights what is not alike
  int64_t* sums = nullptr;     // likewise: running sums of the rest, or null where rows are drawn apart
  int32_t* indices = nullptr;  // (batch, k)
  float* scales = nullptr;     // likewise; NaN where a norm was negative or no number
};

TILEWISE_FN RowSample problem_of(RowSample call, int64_t problem) {
  call.x_norms += problem * call.rows;
  if (call.y_norms != nullptr) call.y_norms += problem * call.rows;
  call.own += problem * call.rows;
  if (call.sums != nullptr) call.sums += problem * call.rows;
  call.indices += problem * call.k;
  call.scales += problem * call.k;
  return call;
}

// Elements of any strides.
struct RowBatch {
  Dtype dtype = Dtype::kFloat32;
  int64_t batch = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  const void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

struct RowNorms {
  RowBatch x;
  float* out = nullptr;  // (batch, rows)
};

struct RowGather {
  RowBatch x;
  int64_t k = 0;
  const int32_t* indices = nullptr;  // (batch, k)
  const float* scales = nullptr;     // likewise, or null
  void* out = nullptr;               // (batch, k, columns)
};

constexpr int64_t kMixBits = 16;

constexpr int64_t bit_width(int64_t n) { return n == 0 ? 0 : 1 + bit_width(n / 2); }

// Bits of the largest weight: k times the sum of weights stays below 2^62.
constexpr int64_t weight_bits(int64_t rows, int64_t k) {
  const int64_t left = 60 - bit_width(rows) - bit_width(k);
  return left < 30 ? left : 30;
}

template <typename Storage>
TILEWISE_FN const Storage* row_of(const RowBatch& x, int64_t problem, int64_t row) {
  return static_cast<const Storage*>(x.data) + problem * x.batch_stride + row * x.row_stride;
}

// A double: the product of two floats, exactly.
TILEWISE_FN double size_of(const RowSample& call, int64_t row) {
  const double norm = call.x_norms[row];
  return call.y_norms == nullptr ? norm : norm * static_cast<double>(call.y_norms[row]);
}

TILEWISE_FN bool is_size(double size) { return size >= 0 && size < infinity<double>(); }

// NaN where one of them is no size.
TILEWISE_FN double larger(double a, double b) {
  if (!is_size(a) || !is_size(b)) return quiet_nan<double>();
  return a > b ? a : b;
}

// The size in units of which the largest has 2^bits; none where that is NaN.
TILEWISE_FN int64_t units_of(double size, double largest, int64_t bits) {
  return largest > 0 ? static_cast<int64_t>(size / largest * static_cast<double>(int64_t{1} << bits)) : 0;
}

// A weight is what all rows have, of the mean of units, and what a row has of its own, below 2^31. At least 1: rows of
// no size may have got one since their norms were taken.
TILEWISE_FN int64_t weight_of_all(int64_t mean, int64_t mix) { return 1 + (mean * mix >> kMixBits); }
TILEWISE_FN uint32_t own_weight(int64_t units, int64_t mix) {
  return static_cast<uint32_t>(units * ((int64_t{1} << kMixBits) - mix) >> kMixBits);
}

// How the k places are shared out: `kept` to rows that are certain, `left` to draws from rows of weight `rest`.
struct Shares {
  bool usable;   // all sizes
  bool certain;  // whether rows may be
  int64_t of_all;
  int64_t total;
  int64_t kept;
  int64_t left;
  int64_t rest;
};

// The draws of all rows, with the sums of their units and of what they weigh of their own.
TILEWISE_FN Shares none_certain(const RowSample& call, double largest, int64_t units, int64_t own) {
  const int64_t of_all = weight_of_all(units / call.rows, call.mix), total = call.rows * of_all + own;
  return {is_size(largest), call.method != SampleMethod::kCrs, of_all, total, 0, call.k, total};
}

// Takes in `kept` certain rows, of weight `heavy` in all.
TILEWISE_FN void keep(Shares& shares, int64_t kept, int64_t heavy) {
  shares.left -= kept - shares.kept;
  shares.kept = kept;
  shares.rest = shares.total - heavy;
}

// Whether a row is certain. Begin with none kept and take in what this says until nothing changes: with every row that
// comes in rest / left falls, so that no other has to go, and in the end no c has a lower one.
TILEWISE_FN bool keeps(const Shares& shares, int64_t weight) {
  return shares.certain && weight * shares.left >= shares.rest;
}

// 1 / how often a row is expected among the draws.
TILEWISE_FN float scale_of(const Shares& shares, int64_t weight) {
  return static_cast<float>(static_cast<double>(shares.rest) / static_cast<double>(shares.left * weight));
}

// In [0, rest), 0 for none, from the number `index` of the stream of a seed: SplitMix64 (Steele, Lea and Flood, 2014).
TILEWISE_FN int64_t random_below(int64_t rest, int64_t seed, int64_t index) {
  uint64_t z = static_cast<uint64_t>(seed) + (static_cast<uint64_t>(index) + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  const double share = static_cast<double>(static_cast<int64_t>(z >> 11)) * 0x1p-53;
  const int64_t number = static_cast<int64_t>(share * static_cast<double>(rest));
  return number < rest || rest == 0 ? number : rest - 1;  // the product was rounded up
}

// Of the points (start + t rest) / left, t = 0 .. left - 1, how many lie before weights that sum to `before`, and
// whether one more does. A row that is not certain weighs less than rest / left, so that there is one point on it at
// most.
TILEWISE_FN int64_t points_before(const Shares& shares, int64_t start, int64_t before) {
  const int64_t along = shares.left * before - start;
  return along > 0 ? (along + shares.rest - 1) / shares.rest : 0;
}

TILEWISE_FN bool passes(const Shares& shares, int64_t start, int64_t before, int64_t points) {
  return shares.left * before - start > points * shares.rest;
}

// The first row whose running sum is above `point`.
TILEWISE_FN int64_t row_at(const int64_t* sums, int64_t rows, int64_t point) {
  int64_t first = 0, last = rows - 1;
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (sums[middle] > point) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  return first;
}

TILEWISE_FN void put(const RowSample& call, const Shares& shares, int64_t place, int64_t row, float scale) {
  call.indices[place] = static_cast<int32_t>(row);
  call.scales[place] = shares.usable ? scale : quiet_nan<float>();
}

// What lies before a row: certain rows, points, and weights of the rest.
struct Before {
  int64_t kept;
  int64_t points;
  int64_t weight;
};

// Puts a row that is certain, or drawn apart, to its place, all in the order of rows; with replacement the running sum
// is noted.
TILEWISE_FN void put_row(const RowSample& call, const Shares& shares, int64_t start, int64_t row, Before& before) {
  const int64_t weight = shares.of_all + call.own[row];
  if (keeps(shares, weight)) {
    put(call, shares, before.kept++ + before.points, row, 1.0f);
  } else {
    before.weight += weight;
    if (call.sums == nullptr && passes(shares, start, before.weight, before.points))
      put(call, shares, before.kept + before.points++, row, scale_of(shares, weight));
  }
  if (call.sums != nullptr) call.sums[row] = before.weight;
}

// The draw `index` of those with replacement, from the running sums.
TILEWISE_FN void put_draw(const RowSample& call, const Shares& shares, int64_t stream, int64_t index) {
  const int64_t row = row_at(call.sums, call.rows, random_below(shares.rest, *call.seed, stream + index));
  const int64_t weight = call.sums[row] - (row > 0 ? call.sums[row - 1] : 0);
  put(call, shares, shares.kept + index, row, scale_of(shares, weight));
}

template <typename Function>
inline void with_elements(Dtype dtype, const Function& f) {
  if (dtype == Dtype::kFloat32) {
    f(float{});
  } else if (dtype == Dtype::kBFloat16) {
    f(BFloat16{});
  } else {
    f(Float16{});
  }
}

struct WtaCrsKernels {
  void (*norms)(const RowNorms&, int64_t begin, int64_t end);    // of rows, over the batch
  void (*sample)(const RowSample&, int64_t begin, int64_t end);  // of problems
  void (*gather)(const RowGather&, int64_t begin, int64_t end);  // of places, over the batch
};
TILEWISE_DECLARE_KERNELS(WtaCrsKernels, wta_crs_kernels)

const char* wta_crs_norms_cuda(const RowNorms& call, void* stream);
const char* wta_crs_gather_cuda(const RowGather& call, void* stream);

}  // namespace tilewise
