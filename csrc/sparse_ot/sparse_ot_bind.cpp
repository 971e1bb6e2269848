// sparse_ot: arguments, memory, registration. Everything is dense, of the type that is computed in.
#include "common/operator.h"
#include "sparse_ot/sparse_ot.h"
#include "transport/problems.h"
#if defined(TILEWISE_CUDA)
#include "sparse_ot/sparse_ot_launch.h"
#else
#include "sparse_ot/sparse_ot_cpu.h"
#endif

namespace tilewise {
namespace {

struct Problems : Shape {
  int64_t k;
  double gamma;

  std::vector<int64_t> of_rows() const { return {batch, rows}; }
  std::vector<int64_t> of_columns() const { return {batch, columns}; }
  Tensor empty(std::vector<int64_t> sizes) const { return new_output(first, sizes, first.scalar_type()); }
  Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) const { return new_output(first, sizes, dtype); }
};

Problems problems_of(const Tensor& costs, int64_t k, double gamma, const char* op) {
  computed(costs, op, "costs");
  require(costs.dim() == 3 && costs.size(1) > 0 && costs.size(2) > 0, op,
          "expected costs to have shape (batch, columns, rows) with rows and columns, got ", shape_of(costs));
  const int64_t rows = costs.size(2);
  require(k >= 1 && k <= rows, op, "expected k to be in [1, ", rows, "], the rows, got ", k);
  return {{costs, op, costs.size(0), rows, costs.size(1)}, k, gamma};
}

struct Lists {
  Tensor values, indices, beta, margin;

  explicit Lists(const Problems& of)
      : values(of.empty({of.batch, of.columns, of.k})),
        indices(of.empty({of.batch, of.columns, of.k}, ScalarType::Long)),
        beta(of.empty(of.of_columns())),
        margin(of.empty(of.of_columns())) {}

  template <typename T>
  SparseColumns<T> describe(const Problems& of, const Tensor& costs) const {
    SparseColumns<T> call{.batch = of.batch, .rows = of.rows, .columns = of.columns, .k = of.k};
    call.gamma = positive<T>(of.gamma, of.op, "gamma");
    call.costs = of.dense<T>(costs, {of.batch, of.columns, of.rows}, "costs");
    call.values = static_cast<T*>(values.data_ptr());
    call.indices = static_cast<int64_t*>(indices.data_ptr());
    call.beta = static_cast<T*>(beta.data_ptr());
    call.margin = static_cast<T*>(margin.data_ptr());
    return call;
  }
};

#if defined(TILEWISE_CUDA)

void run(const SparseColumns<float>& call, const Problems& of) {
  launch_with<SparseOtLaunches>(of, SparseOtLaunches::columns_bytes(call),
                                [&](auto& launches) { return launches.columns(call); });
}

void run(const SparseOtCall<float>& call, const Problems& of) {
  launch_with<SparseOtLaunches>(of, SparseOtLaunches::solve_bytes(call),
                                [&](auto& launches) { return launches.solve(call); });
}

#else

// Workers of one problem: one where problems lie beside each other, or where there is little to do.
int64_t workers_of(const Problems& of) {
  constexpr int64_t kMinCosts = 1 << 17;  // costs: fewer take less time than threads need to meet where cores are busy
  const bool alone = of.rows * of.columns < kMinCosts;
  return alone || of.batch >= static_cast<int64_t>(torch::stable::get_num_threads()) ? 1
                                                                                     : std::min(of.columns, kWorkers);
}

template <typename T>
void run(const SparseColumns<T>& call, const Problems& of) {
  const SparseOtKernels<T>& kernels = selected_sparse_ot_kernels().of<T>();
  const int64_t workers = workers_of(of);
  each_problem<T>(of.first, of.batch, columns_elements(call, workers),
                  [&](int64_t i, T* scratch, const Parallel& all) { kernels.columns(call, i, scratch, workers, all); });
}

template <typename T>
void run(const SparseOtCall<T>& call, const Problems& of) {
  const SparseColumns<T>& columns = call.columns;
  check_marginals<T>(of.op, of.batch, {call.a, of.rows}, {call.b, of.columns}, true);
  for (int64_t index = 0; index < of.batch && call.method != SparseMethod::kAdam; ++index) {
    const T* a = call.a + index * of.rows;
    const int64_t filled = std::count_if(a, a + of.rows, [](T mass) { return mass > 0; });
    require(filled <= of.k * of.columns, of.op, "expected k n to be at least ", filled, ", the rows with mass, got ",
            of.k, " x ", of.columns);
  }
  const auto usable = [&](int64_t column) {
    const T* costs = columns.costs + column * of.rows;
    int wrong = 0, forbidden = 1;
#pragma omp simd reduction(| : wrong) reduction(& : forbidden)
    for (int64_t i = 0; i < of.rows; ++i) {
      wrong |= !(costs[i] > -infinity<T>());
      forbidden &= costs[i] == infinity<T>();
    }
    return wrong == 0 && forbidden == 0;
  };
  check_all(of.op, of.batch * of.columns, usable, "cost",
            "numbers or inf (forbidden pairs), not all of a column forbidden");
  const SparseOtKernels<T>& kernels = selected_sparse_ot_kernels().of<T>();
  const int64_t workers = workers_of(of);
  each_problem<T>(of.first, of.batch, solve_elements(call, workers),
                  [&](int64_t i, T* scratch, const Parallel& all) { kernels.solve(call, i, scratch, workers, all); });
}

#endif

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sparse_ot_columns(const Tensor& costs, const Tensor& alpha,
                                                                     const Tensor& level, int64_t k, double gamma,
                                                                     bool dual) {
  const Problems of = problems_of(costs, k, gamma, "sparse_ot_columns");
  const DeviceScope scope(costs);
  const Lists lists(of);
  const Tensor row_sums = of.empty(of.of_rows());
  with_statistics(costs, [&](auto zero) {
    using T = decltype(zero);
    SparseColumns<T> call = lists.describe<T>(of, costs);
    call.dual = dual;
    call.alpha = of.dense<T>(alpha, of.of_rows(), "alpha");
    call.level = of.dense<T>(level, of.of_columns(), "level");
    call.row_sums = static_cast<T*>(row_sums.data_ptr());
    call.alpha_stride = call.row_stride = of.rows;
    call.level_stride = of.columns;
    if (of.batch > 0) run(call, of);
  });
  return {lists.values, lists.indices, lists.beta, row_sums, lists.margin};
}

// values, indices, alpha, beta, value, row_error, column_error, margin, n_iter
using Solved = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SparseMethod method_of(const std::string& name, const char* op) {
  if (name == "semi_dual") return SparseMethod::kSemiDual;
  if (name == "dual") return SparseMethod::kDual;
  require(name == "adam", op, "expected method to be 'semi_dual', 'dual' or 'adam', got '", name, "'");
  return SparseMethod::kAdam;
}

Tensor begun(const Problems& of, const std::optional<Tensor>& from, const Tensor& result, const char* name) {
  if (from.has_value()) {
    require_shape(*from, {result.size(0), result.size(1)}, of.op, name);
    require_dtype(*from, result.scalar_type(), of.op, name);
    torch::stable::copy_(const_cast<Tensor&>(result), *from);
  } else {
    torch::stable::zero_(const_cast<Tensor&>(result));
  }
  return result;
}

Solved sparse_ot(const Tensor& costs, const Tensor& a, const Tensor& b, const std::optional<Tensor>& alpha,
                 const std::optional<Tensor>& beta, int64_t k, double gamma, const std::string& method,
                 int64_t max_iter, double tol, double lr) {
  const Problems of = problems_of(costs, k, gamma, "sparse_ot");
  require(max_iter >= 1, of.op, "expected max_iter to be at least 1, got ", max_iter);
  const DeviceScope scope(costs);
  const Lists lists(of);
  const Tensor of_rows = begun(of, alpha, of.empty(of.of_rows()), "alpha");
  begun(of, beta, lists.beta, "beta");
  const Tensor value = of.empty({of.batch}), row_error = of.empty({of.batch}), column_error = of.empty({of.batch});
  const Tensor n_iter = of.empty({of.batch}, ScalarType::Long);
  with_statistics(costs, [&](auto zero) {
    using T = decltype(zero);
    SparseOtCall<T> call{.columns = lists.describe<T>(of, costs), .method = method_of(method, of.op)};
    call.columns.dual = call.method == SparseMethod::kDual;
    call.a = of.dense<T>(a, of.of_rows(), "a");
    call.b = of.dense<T>(b, of.of_columns(), "b");
    call.max_iter = max_iter;
    call.tol = static_cast<T>(tol);
    if (call.method == SparseMethod::kAdam) call.rate = positive<T>(lr, of.op, "lr");
    call.alpha = static_cast<T*>(of_rows.data_ptr());
    call.value = static_cast<T*>(value.data_ptr());
    call.row_error = static_cast<T*>(row_error.data_ptr());
    call.column_error = static_cast<T*>(column_error.data_ptr());
    call.n_iter = static_cast<int64_t*>(n_iter.data_ptr());
    if (of.batch > 0) run(call, of);
  });
  return {lists.values, lists.indices, of_rows, lists.beta, value, row_error, column_error, lists.margin, n_iter};
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_IMPL(tilewise, TILEWISE_DISPATCH_KEY, m) {
  TILEWISE_IMPL(m, "sparse_ot", tilewise::sparse_ot);
  TILEWISE_IMPL(m, "sparse_ot_columns", tilewise::sparse_ot_columns);
}
