// Quadratically regularised optimal transport with at most k entries in each column of the plan:
//
//   min <T, C> + gamma/2 |T|^2   over T >= 0, T 1 = a, T^T 1 = b, at most k entries of each column not 0
//
// Its dual, in potentials alpha of the rows and beta of the columns, with s_ij = alpha_i - C_ij,
//
//   D = <alpha, a> + <beta, b> - gamma/2 |T|^2      T_ij = [s_ij + beta_j]_+ / gamma of the k largest of column j
//
// is concave, with the gradient (a - T 1, b - T^T 1). Semi-dual: beta_j is the one at which column j has the mass b_j
// (simplex_topk.h), so that columns are exact and alpha alone is sought. Where a column's k-th and following score are
// equal (a tie) D has a kink, at which rows cannot be exact.
//
// Costs lie by columns: (batch, columns, rows), each column dense. The plan is a list of the entries of each column in
// the order of their rows; what is left of it is 0, at row 0.
//
// From "Sparsity-Constrained Optimal Transport" (Liu, Puigcerver, Blondel, 2023).
#pragma once

#include "common/isa.h"
#include "sparse_ot/lbfgs.h"

namespace tilewise {

enum class SparseMethod : int32_t { kSemiDual, kDual, kAdam };  // kAdam: of the semi-dual

template <typename T>
struct SparseColumns {
  int64_t batch = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t k = 0;
  T gamma = 1;
  bool dual = false;
  const T* costs = nullptr;  // (batch, columns, rows), dense
  const T* alpha = nullptr;  // (batch, rows)
  int64_t alpha_stride = 0;  // from problem to problem
  const T* level = nullptr;  // (batch, columns): b; dual: beta
  int64_t level_stride = 0;
  T* values = nullptr;  // (batch, columns, k)
  int64_t* indices = nullptr;
  T* beta = nullptr;      // (batch, columns)
  T* row_sums = nullptr;  // (batch, rows), rows apart by row_stride
  int64_t row_stride = 0;
  T* margin = nullptr;  // (batch, columns): s_[k] - s_[k+1] where the following would have had mass, else inf; or null
};

template <typename T>
struct SparseOtCall {
  SparseColumns<T> columns;  // without alpha, level and row_sums
  SparseMethod method = SparseMethod::kSemiDual;
  const T* a = nullptr;  // (batch, rows)
  const T* b = nullptr;  // (batch, columns)
  int64_t max_iter = 1;
  T tol = 0;
  T rate = 0;                 // of Adam
  T* alpha = nullptr;         // (batch, rows): where to start, then the result
  T* value = nullptr;         // (batch,)
  T* row_error = nullptr;     // (batch,)
  T* column_error = nullptr;  // (batch,)
  int64_t* n_iter = nullptr;  // (batch,)
};

// The variables of a problem: alpha, or alpha and beta.
template <typename T>
TILEWISE_FN int64_t variables(const SparseOtCall<T>& call) {
  return call.columns.rows + (call.method == SparseMethod::kDual ? call.columns.columns : 0);
}

// Takes the part of a gradient along (1, -1), of rows and columns, out of it: D is constant there if the sums of a and
// b are equal, and rounding may make it a slope.
template <typename T, typename Team>
TILEWISE_FN void without_null(const Team& team, T* gradient, int64_t rows, int64_t size) {
  const double along =
      team.sum(size, [&](int64_t i) { return static_cast<double>(i < rows ? gradient[i] : -gradient[i]); });
  const T mean = static_cast<T>(along / static_cast<double>(size));
  team.each(size, [&](int64_t i) { gradient[i] -= i < rows ? mean : -mean; });
}

// Adam (Kingma and Ba, 2015); `first_left` and `second_left` are 1 - 0.9^t and 1 - 0.999^t.
template <typename T>
TILEWISE_FN T adam_step(T gradient, T& first, T& second, T first_left, T second_left, T rate) {
  first = T(0.9) * first + T(0.1) * gradient;
  second = T(0.999) * second + T(0.001) * gradient * gradient;
  return rate * (first / first_left) / (::sqrt(second / second_left) + T(1e-8));
}

}  // namespace tilewise
