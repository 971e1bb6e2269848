// sparse_ot on the CPU. Workers share the columns of a problem: scores of a column in cache, its k largest, its list.
// Rows are summed afterwards over the lists, in the order of columns, whatever the number of threads.
#include <algorithm>
#include <limits>
#include <utility>

#include "simplex_topk/project_cpu.h"
#include "sparse_ot/sparse_ot_cpu.h"

namespace tilewise::TILEWISE_ISA {
namespace {

// Of one problem: SparseColumns with pointers to it.
template <typename T>
SparseColumns<T> problem_of(SparseColumns<T> call, int64_t index) {
  call.costs += index * call.columns * call.rows;
  call.alpha += index * call.alpha_stride;
  call.level += index * call.level_stride;
  call.values += index * call.columns * call.k;
  call.indices += index * call.columns * call.k;
  call.beta += index * call.columns;
  call.row_sums += index * call.row_stride;
  if (call.margin != nullptr) call.margin += index * call.columns;
  return call;
}

// The entries of a column that are not 0: how many.
template <typename T>
int64_t solve_column(const SparseColumns<T>& call, int64_t column, const ProjectScratch<T>& scratch, T& hint) {
  const T total = call.gamma * call.level[column];
  const auto low_of = [&](T top) { return call.dual ? -call.level[column] : lowest(top, total); };
  const T* costs = call.costs + column * call.rows;
  T none = quiet_nan<T>();  // a margin wants all scores
  const auto [kept, top, low] =
      keep_largest(scratch, call.rows, call.alpha, costs, call.k, low_of, call.margin != nullptr ? none : hint);
  if (top != top) {
    call.beta[column] = quiet_nan<T>();
    if (call.margin != nullptr) call.margin[column] = infinity<T>();
    return 0;
  }
  const T below = call.dual ? low - top : threshold(scratch.values, kept, total, top);
  call.beta[column] = call.dual ? call.level[column] : -(top + below);
  if (call.margin != nullptr) {
    T last = infinity<T>();
    for (int64_t i = 0; i < kept; ++i) {
      last = scratch.values[i] < last ? scratch.values[i] : last;
      scratch.scores[scratch.where[i]] = -infinity<T>();
    }
    const T following = stage<T>(call.rows, scratch.scores, nullptr, scratch.scores).top;
    call.margin[column] = kept == call.k && following > -call.beta[column] ? last - following : infinity<T>();
  }
  T* values = call.values + column * call.k;
  int64_t* indices = call.indices + column * call.k;
  int64_t count = 0;
  for (int64_t i = 0; i < kept; ++i) {
    const T mass = (scratch.values[i] - top - below) / call.gamma;
    if (!(mass > 0)) continue;
    values[count] = mass;
    indices[count++] = scratch.where[i];
  }
  return count;
}

// What is known of each column from one evaluation to the next: how many entries it has, and a little below where its
// k-th score lies.
template <typename T>
struct Known {
  int64_t* counts;
  T* hints;

  Known(const SparseColumns<T>& call, T* scratch, int64_t workers)
      : counts(reinterpret_cast<int64_t*>(scratch + workers * worker_elements(call))),
        hints(reinterpret_cast<T*>(counts + padded(call.columns))) {
    for (int64_t j = 0; j < call.columns; ++j) hints[j] = quiet_nan<T>();
  }
};

template <typename T>
void solve_columns(const SparseColumns<T>& call, const Known<T>& known, T* scratch, int64_t workers,
                   const Parallel& parallel) {
  int64_t* counts = known.counts;
  parallel(workers, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      const int64_t size = simplex_elements(call.rows);
      T* own = scratch + worker * worker_elements(call);
      const ProjectScratch<T> memory{own, own + size, reinterpret_cast<int64_t*>(own + 2 * size)};
      for (int64_t j = call.columns * worker / workers; j < call.columns * (worker + 1) / workers; ++j)
        counts[j] = solve_column(call, j, memory, known.hints[j]);
    }
  });
  std::memset(call.row_sums, 0, sizeof(T) * call.rows);
  for (int64_t j = 0; j < call.columns; ++j) {
    const T* values = call.values + j * call.k;
    const int64_t* indices = call.indices + j * call.k;
    for (int64_t i = 0; i < counts[j]; ++i) call.row_sums[indices[i]] += values[i];
  }
}

template <typename T>
void fill_up(const SparseColumns<T>& call, const int64_t* counts) {
  for (int64_t j = 0; j < call.columns; ++j) {
    for (int64_t i = counts[j]; i < call.k; ++i) call.values[j * call.k + i] = 0, call.indices[j * call.k + i] = 0;
  }
}

template <typename T>
void columns_kernel(const SparseColumns<T>& call, int64_t index, T* scratch, int64_t workers,
                    const Parallel& parallel) {
  const SparseColumns<T> problem = problem_of(call, index);
  const Known<T> known(call, scratch, workers);
  solve_columns(problem, known, scratch, workers, parallel);
  fill_up(problem, known.counts);
}

struct Alone {
  static constexpr bool first() { return true; }
  template <typename Function>
  void each(int64_t n, const Function& f) const {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) f(i);
  }
  template <typename Function>
  double sum(int64_t n, const Function& f) const {
    double total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) total += f(i);
    return total;
  }
};

struct Evaluation {
  double value;  // -D
  double row_error;
  double column_error;

  double error(bool dual) const { return dual && column_error > row_error ? column_error : row_error; }
};

double relative(double error, double mass) { return mass > 0 ? error / mass : 0.0; }

// At the potentials that `problem` points to. `a` and `b` are the problem's; `off`, if not null, the columns' sums less
// b.
template <typename T>
Evaluation judge(const SparseColumns<T>& problem, const int64_t* counts, const T* a, const T* b, T* off) {
  const Alone alone;
  double squares = 0.0, column_error = 0.0;
  for (int64_t j = 0; j < problem.columns; ++j) {
    const T* values = problem.values + j * problem.k;
    squares += alone.sum(counts[j], [&](int64_t i) { return static_cast<double>(values[i]) * values[i]; });
    const double mass = alone.sum(counts[j], [&](int64_t i) { return static_cast<double>(values[i]); });
    column_error += mass > b[j] ? mass - b[j] : b[j] - mass;
    if (off != nullptr) off[j] = static_cast<T>(mass - b[j]);
  }
  const double of_a = lbfgs_dot(alone, problem.rows, problem.alpha, a);
  const double of_b = lbfgs_dot(alone, problem.columns, problem.beta, b);
  const double row_error = alone.sum(problem.rows, [&](int64_t i) {
    const double off = static_cast<double>(problem.row_sums[i]) - a[i];
    return off < 0 ? -off : off;
  });
  const double mass_a = alone.sum(problem.rows, [&](int64_t i) { return static_cast<double>(a[i]); });
  const double mass_b = alone.sum(problem.columns, [&](int64_t i) { return static_cast<double>(b[i]); });
  return {0.5 * problem.gamma * squares - of_a - of_b, relative(row_error, mass_a), relative(column_error, mass_b)};
}

template <typename T>
void solve_kernel(const SparseOtCall<T>& call, int64_t index, T* scratch, int64_t workers, const Parallel& parallel) {
  const bool dual = call.method == SparseMethod::kDual;
  const int64_t rows = call.columns.rows, columns = call.columns.columns, size = variables(call);
  const T* a = call.a + index * rows;
  const T* b = call.b + index * columns;
  T* alpha = call.alpha + index * rows;
  const Known<T> known(call.columns, scratch, workers);
  const int64_t* counts = known.counts;
  T* next = scratch + columns_elements(call.columns, workers);
  const auto vector = [&] { return std::exchange(next, next + padded(size)); };

  SparseColumns<T> all = call.columns;
  all.margin = nullptr;
  all.alpha = all.level = all.row_sums = nullptr;  // not of the batch
  all.alpha_stride = all.level_stride = all.row_stride = 0;
  SparseColumns<T> problem = problem_of(all, index);
  T* x = vector();
  std::copy_n(alpha, rows, x);
  if (dual) std::copy_n(problem.beta, columns, x + rows);
  T* there = vector();
  problem.row_sums = there;
  problem.level = b;
  int64_t n_iter = 0;

  if (call.method == SparseMethod::kAdam) {
    T* first = vector();
    T* second = vector();
    std::memset(first, 0, sizeof(T) * size);
    std::memset(second, 0, sizeof(T) * size);
    problem.alpha = x;
    for (double of_first = 1.0, of_second = 1.0; n_iter < call.max_iter && !parallel.interrupted(); ++n_iter) {
      solve_columns(problem, known, scratch, workers, parallel);
      const T first_left = static_cast<T>(1.0 - (of_first *= 0.9));
      const T second_left = static_cast<T>(1.0 - (of_second *= 0.999));
#pragma omp simd
      for (int64_t i = 0; i < rows; ++i)
        x[i] -= adam_step(there[i] - a[i], first[i], second[i], first_left, second_left, call.rate);
    }
  } else {
    Lbfgs<T> search{.size = size, .unit = std::numeric_limits<T>::epsilon(), .x = x, .there = there};
    search.gradient = vector();
    search.trial = vector();
    search.direction = vector();
    search.steps = next;
    search.changes = next + kHistory * size;
    LbfgsNumbers numbers{};
    numbers.going = 1;
    double pairs[2 * kHistory];
    search.numbers = &numbers;
    search.pairs = pairs;
    std::copy_n(x, size, search.trial);
    problem.alpha = search.trial;
    if (dual) problem.level = search.trial + rows;
    while (numbers.going && numbers.n_iter < call.max_iter && !parallel.interrupted()) {
      solve_columns(problem, known, scratch, workers, parallel);
      const Evaluation evaluation = judge(problem, counts, a, b, dual ? there + rows : nullptr);
      for (int64_t i = 0; i < rows; ++i) there[i] -= a[i];
      without_null(Alone{}, there, rows, size);
      lbfgs_step(Alone{}, search, evaluation.value, evaluation.error(dual), static_cast<double>(call.tol));
    }
    n_iter = numbers.n_iter;
    if (dual) problem.level = x + rows;
  }

  std::copy_n(x, rows, alpha);
  problem.alpha = alpha;
  problem.margin = call.columns.margin + index * columns;
  solve_columns(problem, known, scratch, workers, parallel);
  fill_up(problem, counts);
  const Evaluation evaluation = judge(problem, counts, a, b, static_cast<T*>(nullptr));
  call.value[index] = static_cast<T>(-evaluation.value);
  call.row_error[index] = static_cast<T>(evaluation.row_error);
  call.column_error[index] = static_cast<T>(evaluation.column_error);
  call.n_iter[index] = n_iter;
}

template <typename T>
constexpr SparseOtKernels<T> kernels{columns_kernel<T>, solve_kernel<T>};

}  // namespace

extern const ForTypes<SparseOtKernels> sparse_ot_kernels{kernels<float>, kernels<double>};

}  // namespace tilewise::TILEWISE_ISA
