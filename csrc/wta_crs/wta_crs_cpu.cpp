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

Shares weigh(const RowSample& call) {
  double largest = 0.0;
  for (int64_t i = 0; i < call.rows; ++i) largest = larger(largest, size_of(call, i));
  int64_t units = 0, own = 0;
  for (int64_t i = 0; i < call.rows; ++i) {
    const int64_t of_row = units_of(size_of(call, i), largest, call.bits);
    call.own[i] = own_weight(of_row, call.mix);
    units += of_row;
    own += call.own[i];
  }
  return none_certain(call, largest, units, own);
}

void keep_certain(const RowSample& call, Shares& shares) {
  while (shares.certain) {
    int64_t kept = 0, heavy = 0;
#pragma omp simd reduction(+ : kept, heavy)
    for (int64_t i = 0; i < call.rows; ++i) {
      const int64_t weight = shares.of_all + call.own[i];
      const bool is_kept = keeps(shares, weight);
      kept += is_kept ? 1 : 0;
      heavy += is_kept ? weight : 0;
    }
    if (kept == shares.kept) break;
    keep(shares, kept, heavy);
  }
}

void sample_one(const RowSample& call, int64_t problem) {
  Shares shares = weigh(call);
  keep_certain(call, shares);
  const int64_t stream = problem * call.k;
  const int64_t start = random_below(shares.rest, *call.seed, stream);
  Before before{0, 0, 0};
  for (int64_t row = 0; row < call.rows; ++row) put_row(call, shares, start, row, before);
  if (call.sums == nullptr) return;
  for (int64_t i = 0; i < shares.left; ++i) put_draw(call, shares, stream, i);
}

void sample(const RowSample& call, int64_t begin, int64_t end) {
  for (int64_t problem = begin; problem < end; ++problem) sample_one(problem_of(call, problem), problem);
}

}  // namespace

extern const WtaCrsKernels wta_crs_kernels = {norms, sample, gather};

}  // namespace tilewise::TILEWISE_ISA
