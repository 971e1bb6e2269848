// clip_loss on the CPU, for one instruction set. Rows are walked by vectors along themselves; columns by vectors across
// the rows of a chunk, so that nothing depends on how the threads share them.
#include <algorithm>

#include "clip_loss/clip_loss.h"
#include "common/simd.h"

namespace tilewise::TILEWISE_ISA {
namespace {

template <typename T>
constexpr int64_t kSummed = 64 * kLanes<T>;  // columns of a row that are summed apart: long sums keep their digits
constexpr int kBlockRows = 8;                // for which the sums of columns are moved to a new maximum once
template <typename T>
constexpr int64_t kStrip = 2048 / sizeof(T);  // columns whose maxima and sums stay in the first cache

// z over the similarities of a row: rounded before anything is taken off it.
template <typename T>
T* form_row(const ClipChunk<T>& chunk, int64_t row) {
  T* z = chunk.similarities + row * chunk.columns;
  const T scale = *chunk.scale;
#pragma omp simd
  for (int64_t j = 0; j < chunk.columns; ++j) z[j] *= scale;
  return z;
}

template <typename T>
void take_rows(const ClipChunk<T>& chunk, int64_t begin, int64_t end) {
  constexpr T kNone = -infinity<T>();
  for (int64_t i = begin; i < end; ++i) {
    T* z = form_row(chunk, i);
    const int64_t own = chunk.first + i;
    chunk.state.share[own] = z[own];
    z[own] = kNone;
    Vector<T> maxima = Vector<T>{} + kNone;
    each_vector(z, chunk.columns, kNone, [&](Vector<T> x) { maxima = x > maxima ? x : maxima; });
    const T max = lane_max<T>(maxima);
    const T shift = clip_shift(max);
    Vector<T> sums = {};
    for (int64_t j = 0; j < chunk.columns; j += kSummed<T>) {
      Vector<T> part = {};
      each_vector(z + j, std::min(kSummed<T>, chunk.columns - j), kNone,
                  [&](Vector<T> x) { part += fast_exp(x - shift); });
      sums += part;
    }
    chunk.state.row_max[own] = max;
    chunk.state.row_weight[own] = lane_sum<T>(sums);
  }
}

// Joins kRows rows to the maxima and sums of `count` columns, up to a vector.
template <int kRows, typename T>
TILEWISE_FN void join_rows(const T* z, int64_t stride, int64_t count, T* max, T* sum) {
  constexpr T kNone = -infinity<T>();
  const Vector<T> before = load_vector(max);
  Vector<T> rows[kRows], top = before;
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
    rows[k] = count >= kLanes<T> ? load_vector(z + k * stride) : load_some(z + k * stride, count, kNone);
    top = rows[k] > top ? rows[k] : top;
  }
  const Vector<T> shift = top == kNone ? Vector<T>{} : top;
  Vector<T> part = {};
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) part += fast_exp(rows[k] - shift);
  store_vector(top, max);
  store_vector(load_vector(sum) * fast_exp(before - shift) + part, sum);
}

// Of a strip of columns: the chunk alone, then joined to the chunks before it.
template <typename T>
void take_strip(const ClipChunk<T>& chunk, int64_t begin, int64_t width) {
  alignas(kVectorBytes) T max[kStrip<T>], sum[kStrip<T>];
  for (int64_t j = 0; j < kStrip<T>; ++j) max[j] = -infinity<T>(), sum[j] = T(0);
  const T* z = chunk.similarities + begin;
  const int64_t blocks = chunk.rows / kBlockRows * kBlockRows;
  for (int64_t row = 0; row < blocks; row += kBlockRows) {
    for (int64_t j = 0; j < width; j += kLanes<T>)
      join_rows<kBlockRows>(z + row * chunk.columns + j, chunk.columns, width - j, max + j, sum + j);
  }
  for (int64_t row = blocks; row < chunk.rows; ++row) {
    for (int64_t j = 0; j < width; j += kLanes<T>)
      join_rows<1>(z + row * chunk.columns + j, chunk.columns, width - j, max + j, sum + j);
  }
  const ClipState<T>& state = chunk.state;
  for (int64_t j = 0; j < width; ++j) {
    const ClipPart<T> found{max[j], sum[j]};
    const ClipPart<T> before{state.column_max[begin + j], state.column_weight[begin + j]};
    const ClipPart<T> all = chunk.first > 0 ? joined(before, found) : found;
    state.column_max[begin + j] = all.max;
    state.column_weight[begin + j] = all.sum;
  }
}

template <typename T>
void take_columns(const ClipChunk<T>& chunk, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j += kStrip<T>) take_strip(chunk, j, std::min(kStrip<T>, end - j));
}

template <typename T>
void finish(const ClipLosses<T>& op, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) finish_pair(op, i);
}

template <typename T>
void gradient(const ClipChunk<T>& chunk, int64_t begin, int64_t end) {
  const ClipState<T>& state = chunk.state;
  for (int64_t i = begin; i < end; ++i) {
    T* z = form_row(chunk, i);
    const int64_t own = chunk.first + i;
    const T upstream = chunk.grad_loss != nullptr ? chunk.grad_loss[own] : T(1);
    const T weight = upstream * state.row_weight[own];
    const T max = state.row_max[own];
    const auto write = [&](int64_t j, const auto& load, const auto& store) {
      const Vector<T> x = load(z + j);
      Vector<T> of_column = load(state.column_weight + j);
      if (chunk.grad_loss != nullptr) of_column *= load(chunk.grad_loss + j);
      store(weight * fast_exp(x - max) + of_column * fast_exp(x - load(state.column_max + j)));
    };
    int64_t j = 0;
    for (; j + kLanes<T> <= chunk.columns; j += kLanes<T>)
      write(j, [](const T* from) { return load_vector(from); }, [&](Vector<T> g) { store_vector(g, z + j); });
    const int64_t rest = chunk.columns - j;
    if (rest > 0)
      write(
          j, [=](const T* from) { return load_some(from, rest); }, [&](Vector<T> g) { store_some<T>(g, rest, z + j); });
    z[own] = -upstream * state.share[own];
  }
}

template <typename T>
constexpr ClipKernels<T> kKernels{
    .take_rows = take_rows<T>, .take_columns = take_columns<T>, .finish = finish<T>, .gradient = gradient<T>};

}  // namespace

extern const ForTypes<ClipKernels> clip_kernels{.on_float = kKernels<float>, .on_double = kKernels<double>};

}  // namespace tilewise::TILEWISE_ISA
