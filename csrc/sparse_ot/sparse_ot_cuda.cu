// The search of sparse_ot on CUDA: a block per problem takes the steps.
#include "common/team.cuh"
#include "sparse_ot/sparse_ot_launch.h"

namespace tilewise {
namespace {

constexpr int kSearch = 1024;   // threads of a problem, at most
constexpr int64_t kFew = 4096;  // variables for which fewer are better: they meet often

__device__ __forceinline__ Lbfgs<float> lbfgs_of(const SparseSearch& search, int64_t problem) {
  Lbfgs<float> p;
  p.size = variables(search.call);
  p.unit = 1.1920929e-7f;
  float* vectors = search.vectors + problem * Lbfgs<float>::kVectors * p.size;
  p.x = vectors;
  p.gradient = vectors + p.size;
  p.trial = vectors + 2 * p.size;
  p.there = vectors + 3 * p.size;
  p.direction = vectors + 4 * p.size;
  p.steps = vectors + 5 * p.size;
  p.changes = p.steps + kHistory * p.size;
  p.pairs = search.pairs + problem * 2 * kHistory;
  p.numbers = search.numbers + problem;
  return p;
}

__global__ void __launch_bounds__(kSearch) sparse_begin_kernel(const __grid_constant__ SparseSearch search) {
  const int64_t problem = blockIdx.x, rows = search.call.columns.rows, columns = search.call.columns.columns;
  const Team team(dynamic_shared());
  if (team.first()) {
    LbfgsNumbers numbers{};
    numbers.going = 1;
    search.numbers[problem] = numbers;
  }
  if (search.call.method == SparseMethod::kAdam) {
    team.each(2 * rows, [&](int64_t i) { search.vectors[problem * 2 * rows + i] = 0.0f; });
    return;
  }
  const Lbfgs<float> p = lbfgs_of(search, problem);
  team.each(p.size, [&](int64_t i) {
    const float start =
        i < rows ? search.call.alpha[problem * rows + i] : search.call.columns.beta[problem * columns + i - rows];
    p.x[i] = p.trial[i] = start;
  });
}

struct Errors {
  double value;  // -D
  double row_error;
  double column_error;
};

// At the potentials of `alpha`, where rows have `row_sums` and columns beta and the sums of their cuts.
__device__ __forceinline__ Errors judge(const Team& team, const SparseSearch& search, int64_t problem,
                                        const float* alpha, const float* row_sums) {
  const SparseColumns<float>& call = search.call.columns;
  const float* a = search.call.a + problem * call.rows;
  const float* b = search.call.b + problem * call.columns;
  const float* beta = call.beta + problem * call.columns;
  const SparseCut* cuts = search.cuts + problem * call.columns;
  const auto off = [](double x, double y) { return x < y ? y - x : x - y; };
  const double squares = team.sum(call.columns, [&](int64_t j) { return cuts[j].squares; });
  const double of_columns = team.sum(call.columns, [&](int64_t j) { return off(cuts[j].mass, b[j]); });
  const double mass_b = team.sum(call.columns, [&](int64_t j) { return static_cast<double>(b[j]); });
  double of_rows = 0.0, mass_a = 0.0, dual = 0.0;
#pragma unroll 4
  for (int64_t i = team.rank(); i < call.rows; i += team.size()) {
    of_rows += off(row_sums[i], a[i]);
    mass_a += a[i];
    dual += static_cast<double>(alpha[i]) * a[i];
  }
  of_rows = team.all_sum(of_rows);
  mass_a = team.all_sum(mass_a);
  dual = team.all_sum(dual) + lbfgs_dot(team, call.columns, beta, b);
  return {0.5 * call.gamma * squares - dual, mass_a > 0 ? of_rows / mass_a : 0.0,
          mass_b > 0 ? of_columns / mass_b : 0.0};
}

__global__ void __launch_bounds__(kSearch) sparse_step_kernel(const __grid_constant__ SparseSearch search) {
  const int64_t problem = blockIdx.x, rows = search.call.columns.rows, columns = search.call.columns.columns;
  if (ended(search, problem)) return;
  const Team team(dynamic_shared());
  const Lbfgs<float> p = lbfgs_of(search, problem);
  const Errors errors = judge(team, search, problem, p.trial, p.there);
  team.each(rows, [&](int64_t i) { p.there[i] -= search.call.a[problem * rows + i]; });
  double error = errors.row_error;
  if (search.call.columns.dual) {
    error = errors.column_error > error ? errors.column_error : error;
    team.each(columns, [&](int64_t j) {
      const int64_t at = problem * columns + j;
      p.there[rows + j] = static_cast<float>(search.cuts[at].mass - search.call.b[at]);
    });
  }
  without_null(team, p.there, rows, p.size);
  lbfgs_step(team, p, errors.value, error, static_cast<double>(search.call.tol));
}

// The accepted potentials to where the result is.
__global__ void __launch_bounds__(kSearch) sparse_accept_kernel(const __grid_constant__ SparseSearch search) {
  const int64_t problem = blockIdx.x, rows = search.call.columns.rows, columns = search.call.columns.columns;
  const Lbfgs<float> p = lbfgs_of(search, problem);
  Team(dynamic_shared()).each(p.size, [&](int64_t i) {
    float* to =
        i < rows ? search.call.alpha + problem * rows + i : search.call.columns.beta + problem * columns + i - rows;
    *to = p.x[i];
  });
}

__global__ void __launch_bounds__(kSearch)
    sparse_finish_kernel(const __grid_constant__ SparseSearch search, const float* row_sums) {
  const int64_t problem = blockIdx.x, rows = search.call.columns.rows;
  const Team team(dynamic_shared());
  const Errors errors = judge(team, search, problem, search.call.alpha + problem * rows, row_sums + problem * rows);
  if (!team.first()) return;
  search.call.value[problem] = static_cast<float>(-errors.value);
  search.call.row_error[problem] = static_cast<float>(errors.row_error);
  search.call.column_error[problem] = static_cast<float>(errors.column_error);
  const bool adam = search.call.method == SparseMethod::kAdam;
  search.call.n_iter[problem] = adam ? search.call.max_iter : search.numbers[problem].n_iter;
}

template <typename... Arguments>
const char* launch_problems(void (*kernel)(SparseSearch, Arguments...), const SparseSearch& search, void* stream,
                            const Arguments&... arguments) {
  const dim3 grid(static_cast<unsigned>(search.call.columns.batch));
  const dim3 block(variables(search.call) <= kFew ? kSearch / 4 : kSearch);
  return launch(kernel, grid, block, kTeamBytes, stream, search, arguments...);
}

}  // namespace

const char* sparse_begin_cuda(const SparseSearch& search, void* stream) {
  return launch_problems(sparse_begin_kernel, search, stream);
}

const char* sparse_step_cuda(const SparseSearch& search, void* stream) {
  return launch_problems(sparse_step_kernel, search, stream);
}

const char* sparse_accept_cuda(const SparseSearch& search, void* stream) {
  return launch_problems(sparse_accept_kernel, search, stream);
}

const char* sparse_finish_cuda(const SparseSearch& search, float* row_sums, void* stream) {
  return launch_problems<const float*>(sparse_finish_kernel, search, stream, row_sums);
}

}  // namespace tilewise
