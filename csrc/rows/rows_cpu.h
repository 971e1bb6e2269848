// The row engine on the CPU. A row is walked in tiles that stay in the first-level cache; every optional term
// is its own short loop over the tile, so the plain path pays for none of them and each loop vectorises.
#pragma once

#include "common/simd.h"
#include "rows/rows.h"

namespace tilewise::TILEWISE_ISA {

constexpr int64_t kTile = 1024;

template <typename T, typename Storage>
TILEWISE_FN void load_strided(const Storage* source, int64_t stride, int64_t n, T* out) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(to_float(source[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(to_float(source[i * stride]));
  }
}

template <typename Storage, typename T>
TILEWISE_FN void store_strided(const T* source, int64_t stride, int64_t n, Storage* out) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) from_float(static_cast<float>(source[i]), out[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) from_float(static_cast<float>(source[i]), out[i * stride]);
  }
}

// Columns [begin, begin + n) of a row as T: in place when the memory already holds that, else through buffer.
template <typename T>
static const T* load_tile(const RowMatrix& matrix, int64_t row, int64_t begin, int64_t n, T* buffer) {
  const int64_t offset = row * matrix.row_stride + begin * matrix.column_stride;
  const int64_t stride = matrix.column_stride;
  switch (matrix.dtype) {
    case Dtype::kFloat64: {
      const double* source = static_cast<const double*>(matrix.data) + offset;
      if constexpr (sizeof(T) == sizeof(double)) {
        if (stride == 1) return source;
      }
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(source[i * stride]);
      break;
    }
    case Dtype::kFloat32: {
      const float* source = static_cast<const float*>(matrix.data) + offset;
      if constexpr (sizeof(T) == sizeof(float)) {
        if (stride == 1) return source;
      }
      load_strided(source, stride, n, buffer);
      break;
    }
    case Dtype::kBFloat16:
      load_strided(static_cast<const BFloat16*>(matrix.data) + offset, stride, n, buffer);
      break;
    case Dtype::kFloat16:
      load_strided(static_cast<const Float16*>(matrix.data) + offset, stride, n, buffer);
      break;
  }
  return buffer;
}

// Where a tile of the gradient is computed: the destination itself when it has type T and unit stride.
template <typename T>
static T* output_tile(const RowMatrix& matrix, int64_t row, int64_t begin, T* buffer) {
  const Dtype own = sizeof(T) == sizeof(double) ? Dtype::kFloat64 : Dtype::kFloat32;
  if (matrix.dtype != own || matrix.column_stride != 1) return buffer;
  return static_cast<T*>(matrix.data) + row * matrix.row_stride + begin;
}

template <typename T>
static void store_tile(const RowMatrix& matrix, int64_t row, int64_t begin, int64_t n, const T* tile) {
  const int64_t offset = row * matrix.row_stride + begin * matrix.column_stride;
  const int64_t stride = matrix.column_stride;
  switch (matrix.dtype) {
    case Dtype::kFloat64: {
      double* out = static_cast<double*>(matrix.data) + offset;
      if (stride == 1 && static_cast<const void*>(out) == tile) return;
      for (int64_t i = 0; i < n; ++i) out[i * stride] = static_cast<double>(tile[i]);
      break;
    }
    case Dtype::kFloat32: {
      float* out = static_cast<float*>(matrix.data) + offset;
      if (stride == 1 && static_cast<const void*>(out) == tile) return;
      store_strided(tile, stride, n, out);
      break;
    }
    case Dtype::kBFloat16:
      store_strided(tile, stride, n, static_cast<BFloat16*>(matrix.data) + offset);
      break;
    case Dtype::kFloat16:
      store_strided(tile, stride, n, static_cast<Float16*>(matrix.data) + offset);
      break;
  }
}

// Effective logits of a tile.
template <typename T>
static const T* load_logits(const RowMatrix& matrix, const Transform<T>& transform, int64_t row, int64_t begin,
                            int64_t n, T* buffer) {
  const T* raw = load_tile(matrix, row, begin, n, buffer);
  if (is_identity(transform)) return raw;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = apply(transform, raw[i]);
  return buffer;
}

// c_k of a tile: w_k (uniform + soft t_k)
template <typename T>
static void dense_coefficients(const DenseTarget<T>& dense, int64_t row, int64_t begin, int64_t n, T* out) {
  if (dense.soft != T(0)) {
    const T* t = load_tile(dense.probabilities, row, begin, n, out);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = dense.uniform + dense.soft * t[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = dense.uniform;
  }
  if (dense.weight != nullptr) {
    const T* weight = dense.weight + begin;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] *= weight[i];
  }
}

template <typename T>
TILEWISE_FN T tile_max(const T* x, int64_t n) {
  T result = -infinity<T>();
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

template <typename T>
struct ExpSum {
  T sum;  // of e^(x - origin)
  T max;  // of x
};

template <typename T>
TILEWISE_FN ExpSum<T> tile_exp_sum(const T* x, int64_t n, T origin) {
  Vector<T> sum{};
  Vector<T> max = Vector<T>{} - infinity<T>();
  each_vector(x, n, -infinity<T>(), [&](Vector<T> v) __attribute__((always_inline)) {
    sum += fast_exp(v - origin);
    max = v > max ? v : max;
  });
  return {lane_sum<T>(sum), lane_max<T>(max)};
}

// The same without the maximum, which is known, once.
template <typename T>
TILEWISE_FN T tile_exp_sum_below(const T* x, int64_t n, T max, T origin) {
  Vector<T> sum{};
  Vector<T> equals{};
  each_vector(x, n, -infinity<T>(), [&](Vector<T> v) __attribute__((always_inline)) {
    sum += v == max ? Vector<T>{} : fast_exp(v - origin);
    equals += v == max ? Vector<T>{} + T(1) : Vector<T>{};
  });
  const T others = lane_sum<T>(equals) - T(1);
  return lane_sum<T>(sum) + (others > T(0) ? others * fast_exp(max - origin) : T(0));
}

// sum e^(x-m) (x-m) of a tile and of the maximum before it, with 0 e^-inf = 0
template <typename T>
TILEWISE_FN T tile_exp_dot(const T* x, int64_t n, T running, T max) {
  const T before = running - max < ExpFloor<T>::value ? ExpFloor<T>::value : running - max;
  T result = fast_exp(before) * before;
#pragma omp simd reduction(+ : result)
  for (int64_t i = 0; i < n; ++i) {
    const T d = x[i] - max;
    const T clamped = d < ExpFloor<T>::value ? ExpFloor<T>::value : d;
    result += fast_exp(clamped) * clamped;
  }
  return result;
}

// weight_sum = sum c;  weighted_dot = sum c (x - m), a coefficient of 0 hiding even x = -inf
template <typename T>
TILEWISE_FN void add_targets(const T* x, const T* c, int64_t n, T origin, SoftmaxStats<T>& stats) {
  T weight_sum = 0;
  T weighted_dot = 0;
#pragma omp simd reduction(+ : weight_sum, weighted_dot)
  for (int64_t i = 0; i < n; ++i) {
    weight_sum += c[i];
    weighted_dot += c[i] != T(0) ? c[i] * (x[i] - origin) : T(0);
  }
  stats.weight_sum += weight_sum;
  stats.weighted_dot += weighted_dot;
}

// Sums are taken relative to an origin, the maximum of the first tile: that of the row would be a pass more. Only a
// tile that rises more than kSlack above it moves it, before e^(x - origin) could overflow. exp_dot moves with every
// maximum, because its terms cancel relative to anything smaller. A new maximum is taken off the sum of its tile, or
// the tile summed again without it where it is most of that.
template <typename T>
static SoftmaxStats<T> softmax_statistics(const RowMatrix& logits, const SoftmaxRequest<T>& request, int64_t row) {
  constexpr T kSlack = 64;
  alignas(64) T buffer[kTile];
  alignas(64) T coefficients[kTile];
  SoftmaxStats<T> stats;  // relative to the origin, which is stats.max until the end
  T max = -infinity<T>();
  for (int64_t begin = 0; begin < logits.columns; begin += kTile) {
    const int64_t n = logits.columns - begin < kTile ? logits.columns - begin : kTile;
    const T* x = load_logits(logits, request.transform, row, begin, n, buffer);
    const bool first = stats.max == -infinity<T>();
    T origin = first ? tile_max(x, n) : stats.max;
    const bool empty = origin == -infinity<T>();
    if (empty) origin = T(0);  // nothing but -inf so far, and -inf - -inf is NaN
    ExpSum<T> exps{.sum = 0, .max = origin};
    if (empty || !first) exps = tile_exp_sum(x, n, origin);
    const bool rises = exps.max > max;
    if (rises) {
      const bool is_high = exps.max > origin + kSlack;
      if (is_high) origin = exps.max;
      const T most = fast_exp(exps.max - origin);
      const bool dominates = first || is_high || !(exps.sum > 2 * most);
      exps.sum = dominates ? tile_exp_sum_below(x, n, exps.max, origin) : exps.sum - most;
      if (request.details) {
        exps.sum *= fast_exp(origin - exps.max);
        origin = exps.max;
      }
    }
    if (!empty) rebase(stats, origin);
    stats.sum += exps.sum;
    if (rises && max > -infinity<T>()) stats.sum += fast_exp(max - origin);
    if (request.details) {
      stats.exp_dot += tile_exp_dot(x, n, max, origin);
      if (rises) {
        stats.argmax = begin;
        while (x[stats.argmax - begin] != exps.max) ++stats.argmax;
      }
    }
    if (!is_empty(request.dense)) {
      dense_coefficients(request.dense, row, begin, n, coefficients);
      add_targets(x, coefficients, n, origin, stats);
    }
    max = rises ? exps.max : max;
  }
  rebase(stats, max);
  return stats;
}

// Two loops over a cached tile, mean first and then squared deviations, are exact where sum and sum of squares
// would cancel; Chan's merge joins the tiles.
template <typename T>
TILEWISE_FN MomentStats<T> tile_moments(const T* x, int64_t n) {
  const T origin = x[0];
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] - origin;
  const T mean = origin + sum / static_cast<T>(n);
  T m2 = 0;
#pragma omp simd reduction(+ : m2)
  for (int64_t i = 0; i < n; ++i) m2 += (x[i] - mean) * (x[i] - mean);
  return {.count = static_cast<T>(n), .mean = mean, .m2 = m2};
}

template <typename T>
static MomentStats<T> moment_statistics(const RowMatrix& logits, int64_t row) {
  constexpr T kMost = MomentRange<T>::most;
  alignas(64) T buffer[kTile];
  MomentStats<T> stats;
  for (int64_t begin = 0; begin < logits.columns; begin += kTile) {
    const int64_t n = logits.columns - begin < kTile ? logits.columns - begin : kTile;
    MomentStats<T> tile = tile_moments(load_tile(logits, row, begin, n, buffer), n);
    if (!(tile.m2 < kMost * kMost)) {
      constexpr Transform<T> kSmaller{.scale = MomentRange<T>::scale};
      tile = tile_moments(load_logits(logits, kSmaller, row, begin, n, buffer), n);
      tile.scale = kSmaller.scale;
    }
    merge(stats, tile);
  }
  return stats;
}

// c: of the tile, or null for zeros. Only where one column has most of the probability can a c from the user be as near
// to it as to cancel.
template <typename T>
static void softmax_gradient_tile(const RowGradient<T>& row, const T* x, const T* c, bool soft, int64_t n, T* out) {
  if (soft && row.log_sum < T(0.5)) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = softmax_gradient(row, x[i], row.dense * c[i]);
    return;
  }
  if (row.beta == T(0)) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = row.alpha * fast_exp((x[i] - row.max) - row.log_sum);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = softmax_gradient(row, x[i], T(0));
  }
  if (c == nullptr) return;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] -= row.dense * c[i];
}

template <bool kSoftmax, typename Op, typename T>
static void write_gradient(const Op& op, const RowGradient<T>& row_gradient, int64_t row) {
  alignas(64) T buffer[kTile];
  alignas(64) T slopes[kTile];
  alignas(64) T coefficients[kTile];
  alignas(64) T scratch[kTile];
  const RowGradient<T> r = row_gradient;
  const bool transformed = !is_identity(op.transform);
  const T* c = is_empty(op.dense) || r.dense == T(0) ? nullptr : coefficients;
  for (int64_t begin = 0; begin < op.logits.columns; begin += kTile) {
    const int64_t n = op.logits.columns - begin < kTile ? op.logits.columns - begin : kTile;
    T* out = output_tile(op.gradient, row, begin, scratch);
    if (r.zero) {
      for (int64_t i = 0; i < n; ++i) out[i] = T(0);
      store_tile(op.gradient, row, begin, n, out);
      continue;
    }
    const T* x = load_logits(op.logits, op.transform, row, begin, n, buffer);
    if (transformed) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) slopes[i] = slope(op.transform, x[i]);
    }
    const int64_t target = r.target >= begin && r.target < begin + n ? r.target - begin : -1;
    if constexpr (kSoftmax) {
      if (c != nullptr) dense_coefficients(op.dense, row, begin, n, coefficients);
      // Before the loop: out may be x.
      const T rest = c != nullptr && target >= 0 ? r.dense * c[target] : T(0);
      const T at_target = target >= 0 ? softmax_gradient(r, x[target], rest - r.gamma) : T(0);
      softmax_gradient_tile(r, x, c, c != nullptr && op.dense.soft != T(0), n, out);
      if (target >= 0) out[target] = at_target;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = r.kappa + r.lambda * (r.rate * (x[i] - r.mean));
      if (target >= 0) out[target] += r.gamma;
    }
    if (transformed) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] *= slopes[i];
    }
    store_tile(op.gradient, row, begin, n, out);
  }
}

template <typename Op>
static void softmax_forward(const Op& op, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (!skip_row(op, row, true)) finish_row(op, row, softmax_statistics(op.logits, op.request, row));
  }
}

template <typename T, template <typename> typename Op>
static void moment_forward(const Op<T>& op, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (!skip_row(op, row, true)) finish_row(op, row, moment_statistics<T>(op.logits, row));
  }
}

template <bool kSoftmax, typename Op>
static void row_backward(const Op& op, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) write_gradient<kSoftmax>(op, gradient_of_row(op, row), row);
}

}  // namespace tilewise::TILEWISE_ISA
