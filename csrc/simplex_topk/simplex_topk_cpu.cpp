// simplex_topk on the CPU: a row at a time, its scores in the first-level cache.
#include <cstring>

#include "simplex_topk/project_cpu.h"

namespace tilewise::TILEWISE_ISA {
namespace {

template <typename T>
void forward(const SimplexTopk<T>& call, const ProjectScratch<T>& scratch, int64_t begin, int64_t end) {
  T hint = quiet_nan<T>();  // from row to row: as a rule they are alike
  for (int64_t row = begin; row < end; ++row) {
    const T* x = call.x + row * call.columns;
    T* out = call.out + row * call.columns;
    const auto low_of = [&](T top) { return lowest(top, call.scale); };
    const Largest<T> largest = keep_largest<T>(scratch, call.columns, x, nullptr, call.k, low_of, hint);
    if (largest.top != largest.top) {
      for (int64_t i = 0; i < call.columns; ++i) out[i] = quiet_nan<T>();
      continue;
    }
    const T below = threshold(scratch.values, largest.count, call.scale, largest.top);
    std::memset(out, 0, sizeof(T) * call.columns);
    for (int64_t i = 0; i < largest.count; ++i) {
      const T p = scratch.values[i] - largest.top - below;
      out[scratch.where[i]] = p > 0 ? p : T(0);
    }
  }
}

template <typename T>
void backward(const SimplexTopk<T>& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* p = call.x + row * call.columns;
    const T* grad = call.grad + row * call.columns;
    T* out = call.out + row * call.columns;
    T sum = 0, count = 0;
#pragma omp simd reduction(+ : sum, count)
    for (int64_t i = 0; i < call.columns; ++i) {
      sum += p[i] > 0 ? grad[i] : T(0);
      count += p[i] > 0 ? T(1) : T(0);
    }
    const T mean = sum / count;
#pragma omp simd
    for (int64_t i = 0; i < call.columns; ++i) out[i] = p[i] > 0 ? grad[i] - mean : T(0);
  }
}

}  // namespace

extern const ForTypes<SimplexTopkKernels> simplex_topk_kernels{{forward<float>, backward<float>},
                                                               {forward<double>, backward<double>}};

}  // namespace tilewise::TILEWISE_ISA
