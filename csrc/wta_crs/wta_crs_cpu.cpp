// wta_crs on the CPU: a row of elements, or a problem of rows, at a time.
#include <cstring>
#include <type_traits>

#include "wta_crs/wta_crs.h"

namespace tilewise::TILEWISE_ISA {
namespace {

TILEWISE_FN double wide(double value) { return value; }
template <typename Storage>
TILEWISE_FN double wide(Storage value) {
  return static_cast<double>(to_float(value));
}

// Squares are summed in double: whatever the order, float32 comes out the same but once in about 10^8.
template <typename Storage>
void norms_of(const RowNorms& call, int64_t begin, int64_t end) {
  const int64_t columns = call.x.columns, stride = call.x.column_stride;
  for (int64_t i = begin; i < end; ++i) {
    const Storage* x = row_of<Storage>(call.x, i / call.x.rows, i % call.x.rows);
    double sum = 0.0;
    if (stride == 1) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < columns; ++j) sum += wide(x[j]) * wide(x[j]);
    } else {
      for (int64_t j = 0; j < columns; ++j) sum += wide(x[j * stride]) * wide(x[j * stride]);
    }
    call.out[i] = static_cast<float>(::sqrt(sum));
  }
}

template <typename Storage>
void gather_of(const RowGather& call, int64_t begin, int64_t end) {
  const int64_t columns = call.x.columns, stride = call.x.column_stride;
  for (int64_t i = begin; i < end; ++i) {
    const Storage* x = row_of<Storage>(call.x, i / call.k, call.indices[i]);
    Storage* out = static_cast<Storage*>(call.out) + i * columns;
    if (call.scales == nullptr && stride == 1) {
      std::memcpy(out, x, sizeof(Storage) * columns);
    } else if (call.scales == nullptr) {
      for (int64_t j = 0; j < columns; ++j) out[j] = x[j * stride];
    } else {
      const float scale = call.scales[i];
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) {
        if constexpr (std::is_same_v<Storage, double>) {
          out[j] = x[j * stride] * static_cast<double>(scale);
        } else {
          from_float(to_float(x[j * stride]) * scale, out[j]);
        }
      }
    }
  }
}

void norms(const RowNorms& call, int64_t begin, int64_t end) {
  if (call.x.dtype == Dtype::kFloat64) return norms_of<double>(call, begin, end);
  with_elements(call.x.dtype, [&](auto zero) { norms_of<decltype(zero)>(call, begin, end); });
}

void gather(const RowGather& call, int64_t begin, int64_t end) {
  if (call.x.dtype == Dtype::kFloat64) return gather_of<double>(call, begin, end);
  with_elements(call.x.dtype, [&](auto zero) { gather_of<decltype(zero)>(call, begin, end); });
}

// Fills in the weights and returns their sum; `usable` says whether all norms are.
int64_t weigh(const RowSample& call, int64_t* weights, bool& usable) {
  double largest = 0.0;
  usable = true;
  for (int64_t i = 0; i < call.rows; ++i) {
    const double size = size_of(call, i);
    usable = usable && is_size(size);
    largest = size > largest ? size : largest;
  }
  int64_t all = 0, total = 0;
  for (int64_t i = 0; i < call.rows; ++i) {
    weights[i] = usable ? units_of(size_of(call, i), largest, call.bits) : 0;
    all += weights[i];
  }
  for (int64_t i = 0; i < call.rows; ++i) {
    weights[i] = weight_of(weights[i], all / call.rows, call.mix);
    total += weights[i];
  }
  return total;
}

Shares share_out(const RowSample& call, const int64_t* weights, int64_t total) {
  Shares shares{call.method != SampleMethod::kCrs, 0, call.k, total};
  while (shares.certain) {
    int64_t kept = 0, heavy = 0;
#pragma omp simd reduction(+ : kept, heavy)
    for (int64_t i = 0; i < call.rows; ++i) {
      const bool keep = keeps(shares, weights[i]);
      kept += keep ? 1 : 0;
      heavy += keep ? weights[i] : 0;
    }
    if (kept == shares.kept) break;
    shares = {true, kept, call.k - kept, total - heavy};
  }
  return shares;
}

void sample_one(const RowSample& call, int64_t problem) {
  bool usable;
  const int64_t total = weigh(call, call.weights, usable);
  const Shares shares = share_out(call, call.weights, total);
  const int64_t stream = problem * call.k;
  const int64_t start = random_below(shares.rest, *call.seed, stream);
  put_rows(call, shares, start, {0, 0, 0}, 0, call.rows, usable);
  if (call.method == SampleMethod::kSystematic) return;
  for (int64_t i = 0; i < shares.left; ++i) put_draw(call, shares, stream, i, usable);
}

void sample(const RowSample& call, int64_t begin, int64_t end) {
  for (int64_t problem = begin; problem < end; ++problem) sample_one(problem_of(call, problem), problem);
}

}  // namespace

extern const WtaCrsKernels wta_crs_kernels = {norms, sample, gather};

}  // namespace tilewise::TILEWISE_ISA
