// sparse_ot on CUDA: a team (a warp, or a block where columns are long) finds the cut of a column; 8 warps sum 32 rows;
// a block per problem takes the steps of the search.
#include "simplex_topk/project.cuh"
#include "sparse_ot/sparse_ot_launch.h"

namespace tilewise {
namespace {

constexpr int kRows = kWarp;  // of a block that sums rows
constexpr int kParts = 8;     // its warps, each with every eighth column
constexpr int kSearch = 256;  // threads that take a step of a problem

__device__ __forceinline__ bool ended(const SparseSearch& search, int64_t problem) {
  return search.numbers != nullptr && !search.numbers[problem].going;
}

__device__ __forceinline__ Scores scores_of(const SparseColumns<float>& call, int64_t problem, int64_t column) {
  return {call.alpha + problem * call.alpha_stride, call.costs + (problem * call.columns + column) * call.rows};
}

__device__ __forceinline__ Cut cut_of(const SparseCut& cut) {
  return {cut.level, cut.equal, cut.top, cut.below, cut.last};
}

__global__ void __launch_bounds__(256) sparse_cut_kernel(const __grid_constant__ SparseSearch search) {
  const SparseColumns<float>& call = search.call.columns;
  const int64_t at = flat_block() * blockDim.y + threadIdx.y;
  const int64_t problem = at / call.columns;
  if (problem >= call.batch || ended(search, problem)) return;
  const Team team(dynamic_shared());
  const int64_t column = at % call.columns;
  const Scores scores = scores_of(call, problem, column);
  const float level = call.level[problem * call.level_stride + column];
  const Cut cut = find_cut(team, scores, call.rows, call.k, call.gamma * level, call.dual, -level);
  float squares = 0.0f, mass = 0.0f;
  for (int64_t i = team.rank(); i < call.rows; i += team.size()) {
    const float entry = cut.mass(scores(i), i) / call.gamma;
    squares += entry * entry;
    mass += entry;
  }
  squares = team.all_sum(squares);
  mass = team.all_sum(mass);
  team.wait();  // the level of all threads and beta may be the same number
  if (!team.first()) return;
  search.cuts[at] = {cut.level, cut.equal, cut.top, cut.below, cut.last, squares, mass};
  call.beta[at] = call.dual && cut.top == cut.top ? level : -(cut.top + cut.below);
}

// With a step of Adam, where one is taken: only the block that sums a row reads its alpha.
__global__ void __launch_bounds__(kRows* kParts) sparse_rows_kernel(const __grid_constant__ SparseSearch search) {
  const SparseColumns<float>& call = search.call.columns;
  const int64_t tiles = (call.rows + kRows - 1) / kRows;
  const int64_t problem = flat_block() / tiles, row = flat_block() % tiles * kRows + threadIdx.x;
  if (problem >= call.batch || ended(search, problem)) return;
  float* parts = static_cast<float*>(dynamic_shared());
  float sum = 0.0f;
  if (row < call.rows) {
    const float alpha = call.alpha[problem * call.alpha_stride + row];
    const float* costs = call.costs + problem * call.columns * call.rows + row;
    const SparseCut* cuts = search.cuts + problem * call.columns;
#pragma unroll 4
    for (int64_t j = threadIdx.y; j < call.columns; j += kParts)
      sum += cut_of(cuts[j]).mass(alpha - costs[j * call.rows], row);
  }
  parts[threadIdx.y * kRows + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || row >= call.rows) return;
  for (int part = 1; part < kParts; ++part) sum += parts[part * kRows + threadIdx.x];
  sum /= call.gamma;
  call.row_sums[problem * call.row_stride + row] = sum;
  if (search.first_left == 0.0f) return;
  float* moments = search.vectors + problem * 2 * call.rows + row;
  const int64_t at = problem * call.rows + row;
  search.call.alpha[at] -= adam_step(sum - search.call.a[at], moments[0], moments[call.rows], search.first_left,
                                     search.second_left, search.call.rate);
}

// The entries of a column in the order of their rows, by a warp, and its margin.
__global__ void __launch_bounds__(256) sparse_lists_kernel(const __grid_constant__ SparseSearch search) {
  const SparseColumns<float>& call = search.call.columns;
  const int64_t at = flat_block() * blockDim.y + threadIdx.y;
  const int64_t problem = at / call.columns;
  if (problem >= call.batch) return;
  const Team team(dynamic_shared());
  const Scores scores = scores_of(call, problem, at % call.columns);
  const Cut cut = cut_of(search.cuts[at]);
  float* values = call.values + at * call.k;
  int64_t* indices = call.indices + at * call.k;
  int64_t count = 0, kept = 0;
  float last = infinity<float>(), following = -infinity<float>();
  for (int64_t begin = 0; begin < call.rows; begin += kWarp) {
    const int64_t i = begin + team.rank();
    const float s = i < call.rows ? scores(i) : -infinity<float>();
    const bool keeps = i < call.rows && cut.keeps(s, i);
    const float entry = keeps ? cut.mass(s, i) / call.gamma : 0.0f;
    if (keeps) last = fminf(last, s);
    if (!keeps) following = fmaxf(following, s);
    kept += keeps;
    const unsigned used = __ballot_sync(0xffffffffu, entry > 0.0f);
    if (entry > 0.0f) {
      int before = 0;
      for (unsigned bits = used & ((1u << team.rank()) - 1u); bits != 0; bits &= bits - 1) ++before;
      values[count + before] = entry;
      indices[count + before] = i;
    }
    for (unsigned bits = used; bits != 0; bits &= bits - 1) ++count;
  }
  for (int64_t i = count + team.rank(); i < call.k; i += kWarp) values[i] = 0.0f, indices[i] = 0;
  if (call.margin == nullptr) return;
  last = team.all(last, [](float a, float b) { return fminf(a, b); });
  following = team.all(following, [](float a, float b) { return fmaxf(a, b); });
  kept = team.all_sum(kept);
  if (team.first())
    call.margin[at] = kept == call.k && following > cut.top + cut.below ? last - following : infinity<float>();
}

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
  if (threadIdx.x == 0) {
    LbfgsNumbers numbers{};
    numbers.going = 1;
    search.numbers[problem] = numbers;
  }
  if (search.call.method == SparseMethod::kAdam) {
    for (int64_t i = threadIdx.x; i < 2 * rows; i += kSearch) search.vectors[problem * 2 * rows + i] = 0.0f;
    return;
  }
  const Lbfgs<float> p = lbfgs_of(search, problem);
  for (int64_t i = threadIdx.x; i < p.size; i += kSearch) {
    const float start =
        i < rows ? search.call.alpha[problem * rows + i] : search.call.columns.beta[problem * columns + i - rows];
    p.x[i] = p.trial[i] = start;
  }
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
  const double of_rows = team.sum(call.rows, [&](int64_t i) { return off(row_sums[i], a[i]); });
  const double mass_a = team.sum(call.rows, [&](int64_t i) { return static_cast<double>(a[i]); });
  const double mass_b = team.sum(call.columns, [&](int64_t j) { return static_cast<double>(b[j]); });
  const double dual = lbfgs_dot(team, call.rows, alpha, a) + lbfgs_dot(team, call.columns, beta, b);
  return {0.5 * call.gamma * squares - dual, mass_a > 0 ? of_rows / mass_a : 0.0,
          mass_b > 0 ? of_columns / mass_b : 0.0};
}

// One block of a multiprocessor is enough, and registers for it there are.
__global__ void __launch_bounds__(kSearch, 1) sparse_step_kernel(const __grid_constant__ SparseSearch search) {
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
  for (int64_t i = threadIdx.x; i < p.size; i += kSearch) {
    float* to =
        i < rows ? search.call.alpha + problem * rows + i : search.call.columns.beta + problem * columns + i - rows;
    *to = p.x[i];
  }
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
  return launch(kernel, grid, dim3(kSearch), kTeamBytes, stream, search, arguments...);
}

const char* launch_columns(void (*kernel)(SparseSearch), const SparseSearch& search, dim3 block, void* stream) {
  const SparseColumns<float>& call = search.call.columns;
  return launch(kernel, flat_grid(team_blocks(call.batch * call.columns, block)), block, kTeamBytes, stream, search);
}

}  // namespace

const char* sparse_cut_cuda(const SparseSearch& search, void* stream) {
  return launch_columns(sparse_cut_kernel, search, team_block(search.call.columns.rows), stream);
}

const char* sparse_rows_cuda(const SparseSearch& search, void* stream) {
  const SparseColumns<float>& call = search.call.columns;
  const int64_t blocks = call.batch * ((call.rows + kRows - 1) / kRows);
  return launch(sparse_rows_kernel, flat_grid(blocks), dim3(kRows, kParts), kRows * kParts * sizeof(float), stream,
                search);
}

const char* sparse_lists_cuda(const SparseSearch& search, void* stream) {
  return launch_columns(sparse_lists_kernel, search, dim3(kWarp, 8), stream);
}

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
