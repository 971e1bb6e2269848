// The nearest point of a simplex with at most k entries that are not 0, of every row of x:
//
//   p = argmin |x - p|^2 over p >= 0, sum p = scale, at most k of them not 0        p_i = [x_i - tau]_+ of the k
//   largest
//
// with the tau at which they sum to scale. tau >= max x - scale, so only entries above that can matter; of these the k
// largest are found by counting, never by sorting. Equal entries at the end count by their index, the first of them
// first. The derivative on the support S is g - mean_S(g), and 0 elsewhere.
//
// From "Sparsity-Constrained Optimal Transport" (Liu, Puigcerver, Blondel, 2023), proposition 3.
#pragma once

#include "common/isa.h"
#include "common/platform.h"

namespace tilewise {

template <typename T>
struct SimplexTopk {
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t k = 0;
  T scale = 1;
  const T* x = nullptr;     // (rows, columns), dense
  const T* grad = nullptr;  // of the backward: then x is p
  T* out = nullptr;
};

// Between low, which may be -inf, and high, and strictly so for some of the shares 1/5 .. 4/5 if there is a finite
// number strictly between, also where these are the smallest there are.
template <typename T>
TILEWISE_FN T level_between(T low, T high, T share) {
  constexpr T lowest = sizeof(T) == 4 ? T(-3.4028234663852886e38) : T(-1.7976931348623157e308);
  low = low < lowest ? lowest : low;
  const T width = high - low;
  return width < infinity<T>() ? low + width * share : low * (1 - share) + high * share;
}

// Scores in the shared memory of a block on a GPU: 96 KiB of the 99 of sm_86, sm_89 and sm_120.
constexpr int64_t kRoom = 24576;

// Elements of the scratch of a thread that projects rows of `columns` numbers.
TILEWISE_FN int64_t simplex_elements(int64_t columns) {
  constexpr int64_t kLongest = 16;  // a vector of any instruction set
  return (columns + kLongest - 1) / kLongest * kLongest;
}

template <typename T>
struct ProjectScratch {
  T* scores = nullptr;  // simplex_elements: the row, then -inf
  T* values = nullptr;  // likewise: what is kept
  int64_t* where = nullptr;
};

template <typename T>
struct SimplexTopkKernels {
  void (*forward)(const SimplexTopk<T>&, const ProjectScratch<T>&, int64_t begin, int64_t end);
  void (*backward)(const SimplexTopk<T>&, int64_t begin, int64_t end);
};
TILEWISE_DECLARE_KERNELS(ForTypes<SimplexTopkKernels>, simplex_topk_kernels)

const char* simplex_topk_cuda(const SimplexTopk<float>& call, void* stream);
const char* simplex_topk_backward_cuda(const SimplexTopk<float>& call, void* stream);

}  // namespace tilewise
