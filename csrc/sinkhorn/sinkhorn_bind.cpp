// Entropic optimal transport: arguments, memory, registration. Marginals, potentials and epsilon are dense, of the type
// that is computed in; a matrix of costs has any strides.
#include "common/operator.h"
#include "transport/problems.h"
#if defined(TILEWISE_CUDA)
#include "sinkhorn/sinkhorn_launch.h"
#else
#include "sinkhorn/sinkhorn_cpu.h"
#endif

namespace tilewise {
namespace {

Shape shape_of_matrix(const Tensor& cost, const char* op) {
  computed(cost, op, "cost");
  require(cost.dim() == 3 && cost.size(1) > 0 && cost.size(2) > 0, op,
          "expected cost to have shape (batch, rows, columns) with rows and columns, got ", shape_of(cost));
  return {cost, op, cost.size(0), cost.size(1), cost.size(2)};
}

Shape shape_of_points(const Tensor& x, const Tensor& y, const char* op) {
  computed(x, op, "x");
  require(x.dim() == 3 && x.size(1) > 0 && x.size(2) > 0, op,
          "expected x to have shape (batch, points, features) with points and features, got ", shape_of(x));
  require(y.dim() == 3 && y.size(0) == x.size(0) && y.size(1) > 0 && y.size(2) == x.size(2), op,
          "expected y to have shape (batch, points, features) like x, with points, got ", shape_of(y));
  return {x, op, x.size(0), x.size(1), y.size(1)};
}

template <typename T>
Pairs<T> pairs_of_matrix(const Tensor& cost) {
  Pairs<T> pairs{.batch = cost.size(0), .rows = cost.size(1), .columns = cost.size(2)};
  pairs.matrix = static_cast<const T*>(cost.data_ptr());
  pairs.batch_stride = cost.stride(0);
  pairs.row_stride = cost.stride(1);
  pairs.column_stride = cost.stride(2);
  return pairs;
}

// The place of a cost of points in the list, whose first is the matrix.
template <typename... Costs>
int32_t cost_of_points(const std::string& name, const char* op, CostList<MatrixCost, Costs...>) {
  int32_t place = 0;
  const bool known = ((++place, name == Costs::kName) || ...);
  std::string names;
  ((names += names.empty() ? "" : " or ", names += "'", names += Costs::kName, names += "'"), ...);
  require(known, op, "expected cost to be ", names, ", got '", name, "'");
  return place;
}

template <typename T>
Pairs<T> pairs_of_points(const Shape& shape, const Tensor& x, const Tensor& y, const std::string& cost) {
  Pairs<T> pairs{.batch = shape.batch, .rows = shape.rows, .columns = shape.columns, .features = x.size(2)};
  pairs.cost = cost_of_points(cost, shape.op, PairCosts{});
  pairs.x = shape.dense<T>(x, {shape.batch, shape.rows, pairs.features}, "x");
  pairs.y = shape.dense<T>(y, {shape.batch, shape.columns, pairs.features}, "y");
  return pairs;
}

template <typename T>
T penalty(const std::optional<double>& rho, const char* op, const char* name) {
  if (!rho.has_value()) return infinity<T>();
  return positive<T>(*rho, op, name);
}

#if defined(TILEWISE_CUDA)

void run_solve(const SinkhornCall<float>& call, const Shape& shape) {
  launch_with<SinkhornLaunches>(shape, SinkhornLaunches::solve_bytes(call),
                                [&](auto& launches) { return launches.solve(call); });
}

void run_apply(const SinkhornApply<float>& call, const Shape& shape, bool plan) {
  if (plan) return launch_with<SinkhornLaunches>(shape, 0, [&](auto& launches) { return launches.plan(call); });
  launch_with<SinkhornLaunches>(shape, SinkhornLaunches::apply_bytes(call),
                                [&](auto& launches) { return launches.apply(call); });
}

void run_unrolled(const SinkhornUnrolled<float>& call, const Shape& shape) {
  launch_with<SinkhornLaunches>(shape, SinkhornLaunches::unrolled_bytes(call),
                                [&](auto& launches) { return launches.unrolled(call); });
}

#else

// Of a SinkhornCall or a SinkhornUnrolled, on a CPU alone: on a GPU that would synchronise.
template <typename T, template <typename> typename Call>
void check_values(const Call<T>& call, const char* op) {
  const Pairs<T>& pairs = call.pairs;
  const bool penalised = call.rho_a < infinity<T>() || call.rho_b < infinity<T>();
  check_marginals<T>(op, pairs.batch, {call.a, pairs.rows}, {call.b, pairs.columns}, !penalised,
                     " without reg_marginal");
  for (int64_t index = 0; index < pairs.batch; ++index) {
    require(call.epsilon[index] > 0 && std::isfinite(call.epsilon[index]), op,
            "expected epsilon to be a finite number above 0, got ", call.epsilon[index]);
  }
  if (!pairs.is_matrix()) {
    const auto finite = [&](const T* points) {
      return [points, features = pairs.features](int64_t i) {
        T sum = 0;  // NaN if any is not finite
        for (int64_t k = 0; k < features; ++k) sum += points[i * features + k] * T(0);
        return sum == T(0);
      };
    };
    check_all(op, pairs.batch * pairs.rows, finite(pairs.x), "x", "finite numbers");
    check_all(op, pairs.batch * pairs.columns, finite(pairs.y), "y", "finite numbers");
    return;
  }
  const bool rows_first = pairs.column_stride <= pairs.row_stride;
  const int64_t lines = rows_first ? pairs.rows : pairs.columns, length = rows_first ? pairs.columns : pairs.rows;
  const int64_t line_stride = rows_first ? pairs.row_stride : pairs.column_stride;
  const int64_t stride = rows_first ? pairs.column_stride : pairs.row_stride;
  const auto usable = [&](int64_t line) {
    const T* values = pairs.matrix + line / lines * pairs.batch_stride + line % lines * line_stride;
    int wrong = 0;
#pragma omp simd reduction(| : wrong)
    for (int64_t j = 0; j < length; ++j) wrong |= !(values[j * stride] > -infinity<T>());
    return wrong == 0;
  };
  check_all(op, pairs.batch * lines, usable, "cost", "numbers or inf (forbidden pairs)");
}

// Where a solution starts: an epsilon without end would never fall, and a potential without end says nothing.
template <typename T>
void check_start(const SinkhornCall<T>& call, const char* op) {
  const Pairs<T>& pairs = call.pairs;
  const auto finite = [](const T* numbers) { return [numbers](int64_t i) { return std::isfinite(numbers[i]); }; };
  if (call.start != nullptr) check_all(op, pairs.batch, finite(call.start), "start", "finite numbers");
  check_all(op, pairs.batch * pairs.rows, finite(call.f), "f", "finite numbers");
  check_all(op, pairs.batch * pairs.columns, finite(call.g), "g", "finite numbers");
}

constexpr int64_t kMinBatch = 4;  // small problems that are worth the lanes

// Groups of small problems over torch's threads.
template <typename T, template <typename> typename Call>
void each_group(const Call<T>& call, void (*kernel)(const Call<T>&, int64_t, int64_t, const Parallel&)) {
  const int64_t lanes = selected_small_sinkhorn_kernels().of<T>().lanes;
  Interrupt interrupt;
  const Threads parallel(interrupt);
  torch::stable::parallel_for(0, (call.pairs.batch + lanes - 1) / lanes, 1,
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end, parallel); });
}

template <typename T>
void run_solve(const SinkhornCall<T>& call, const Shape& shape) {
  check_values(call, shape.op);
  check_start(call, shape.op);
  if (is_small(call.pairs) && call.pairs.batch >= kMinBatch)
    return each_group(call, selected_small_sinkhorn_kernels().of<T>().solve);
  const auto solve = selected_sinkhorn_kernels().of<T>().solve;
  each_problem<T>(shape.first, shape.batch, solve_elements(call),
                  [&](int64_t i, T* scratch, const Parallel& parallel) { solve(call, i, scratch, parallel); });
}

template <typename T>
void run_apply(const SinkhornApply<T>& call, const Shape& shape, bool plan) {
  const SinkhornKernels<T>& kernels = selected_sinkhorn_kernels().of<T>();
  const auto run = plan ? kernels.plan : kernels.apply;
  each_problem<T>(shape.first, shape.batch, apply_elements(call),
                  [&](int64_t i, T* scratch, const Parallel& parallel) { run(call, i, scratch, parallel); });
}

template <typename T>
void run_unrolled(const SinkhornUnrolled<T>& call, const Shape& shape) {
  check_values(call, shape.op);
  each_group(call, selected_small_sinkhorn_kernels().of<T>().unroll);
}

#endif

struct Options {
  int64_t max_iter;
  double tol;
  const std::optional<double>& rho_a;
  const std::optional<double>& rho_b;
  double scaling;
  bool symmetric;
};

using Solved = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Solved solve(const Shape& shape, const Pairs<T>& pairs, const Tensor& a, const Tensor& b, const Tensor& epsilon,
             const std::optional<Tensor>& f, const std::optional<Tensor>& g, const std::optional<Tensor>& start,
             const Options& options) {
  const auto [_, op, batch, rows, columns] = shape;
  require(options.max_iter >= 1, op, "expected max_iter to be at least 1, got ", options.max_iter);
  require(static_cast<T>(options.scaling) > 0 && static_cast<T>(options.scaling) < 1, op,
          "expected scaling to be in (0, 1), got ", options.scaling);
  require(!options.symmetric || rows == columns, op, "expected a symmetric problem to be square");
  SinkhornCall<T> call{.pairs = pairs};
  call.a = shape.dense<T>(a, {batch, rows}, "a");
  call.b = shape.dense<T>(b, {batch, columns}, "b");
  call.epsilon = shape.dense<T>(epsilon, {batch}, "epsilon");
  call.start = shape.dense<T>(start, {batch}, "start");
  call.scaling = static_cast<T>(options.scaling);
  call.rho_a = penalty<T>(options.rho_a, op, "rho_a");
  call.rho_b = penalty<T>(options.rho_b, op, "rho_b");
  call.max_iter = options.max_iter;
  call.tol = static_cast<T>(options.tol);
  call.symmetric = options.symmetric;
  const auto begun = [&](const std::optional<Tensor>& from, int64_t size, const char* name) {
    Tensor result = torch::stable::new_empty(shape.first, {batch, size}, shape.first.scalar_type());
    if (from.has_value()) {
      shape.dense<T>(*from, {batch, size}, name);
      torch::stable::copy_(result, *from);
    } else {
      torch::stable::zero_(result);
    }
    return result;
  };
  const Tensor f_out = begun(f, rows, "f"), g_out = begun(g, columns, "g");
  const Tensor value = torch::stable::new_empty(shape.first, {batch}, shape.first.scalar_type());
  const Tensor error = torch::stable::new_empty(shape.first, {batch}, shape.first.scalar_type());
  const Tensor n_iter = torch::stable::new_empty(shape.first, {batch}, ScalarType::Long);
  call.f = static_cast<T*>(f_out.data_ptr());
  call.g = static_cast<T*>(g_out.data_ptr());
  call.value = static_cast<T*>(value.data_ptr());
  call.error = static_cast<T*>(error.data_ptr());
  call.n_iter = static_cast<int64_t*>(n_iter.data_ptr());
  if (batch > 0) run_solve(call, shape);
  return {f_out, g_out, value, error, n_iter};
}

Solved sinkhorn(const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                const std::optional<Tensor>& f, const std::optional<Tensor>& g, const std::optional<Tensor>& start,
                int64_t max_iter, double tol, std::optional<double> rho_a, std::optional<double> rho_b,
                double scaling) {
  const Shape shape = shape_of_matrix(cost, "sinkhorn");
  const DeviceScope scope(cost);
  return with_statistics(cost, [&](auto zero) {
    using T = decltype(zero);
    return solve<T>(shape, pairs_of_matrix<T>(cost), a, b, epsilon, f, g, start,
                    {max_iter, tol, rho_a, rho_b, scaling, false});
  });
}

Solved sinkhorn_points(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                       const std::optional<Tensor>& f, const std::optional<Tensor>& g,
                       const std::optional<Tensor>& start, const std::string& cost, int64_t max_iter, double tol,
                       std::optional<double> rho_a, std::optional<double> rho_b, double scaling, bool symmetric,
                       bool allow_tf32) {
  const Shape shape = shape_of_points(x, y, "sinkhorn_points");
  const DeviceScope scope(x);
  return with_statistics(x, [&](auto zero) {
    using T = decltype(zero);
    Pairs<T> pairs = pairs_of_points<T>(shape, x, y, cost);
    pairs.allow_tf32 = allow_tf32;
    return solve<T>(shape, pairs, a, b, epsilon, f, g, start, {max_iter, tol, rho_a, rho_b, scaling, symmetric});
  });
}

template <typename T>
SinkhornApply<T> apply_of(const Shape& shape, const Pairs<T>& pairs, const std::optional<Tensor>& a,
                          const std::optional<Tensor>& b, const Tensor& epsilon, const Tensor& f, const Tensor& g) {
  SinkhornApply<T> call{.pairs = pairs};
  call.a = shape.dense<T>(a, {shape.batch, shape.rows}, "a");
  call.b = shape.dense<T>(b, {shape.batch, shape.columns}, "b");
  call.epsilon = shape.dense<T>(epsilon, {shape.batch}, "epsilon");
  call.f = shape.dense<T>(f, {shape.batch, shape.rows}, "f");
  call.g = shape.dense<T>(g, {shape.batch, shape.columns}, "g");
  return call;
}

Tensor sinkhorn_plan(const Tensor& cost, const std::optional<Tensor>& a, const std::optional<Tensor>& b,
                     const Tensor& epsilon, const Tensor& f, const Tensor& g, std::optional<double>,
                     std::optional<double>) {
  const Shape shape = shape_of_matrix(cost, "sinkhorn_plan");
  const DeviceScope scope(cost);
  return with_statistics(cost, [&](auto zero) {
    using T = decltype(zero);
    SinkhornApply<T> call = apply_of<T>(shape, pairs_of_matrix<T>(cost), a, b, epsilon, f, g);
    const Tensor out = new_output(cost, {shape.batch, shape.rows, shape.columns}, cost.scalar_type());
    call.out = static_cast<T*>(out.data_ptr());
    if (shape.batch > 0) run_apply(call, shape, true);
    return out;
  });
}

template <typename T>
Tensor apply_to(const Shape& shape, SinkhornApply<T> call, const Tensor& v) {
  require(v.dim() == 3, shape.op, "expected v to have shape (batch, columns, values), got ", shape_of(v));
  call.values = v.size(2);
  call.v = shape.dense<T>(v, {shape.batch, shape.columns, call.values}, "v");
  const Tensor out = torch::stable::new_empty(v, {shape.batch, shape.rows, call.values}, v.scalar_type());
  call.out = static_cast<T*>(out.data_ptr());
  if (out.numel() > 0) run_apply(call, shape, false);
  return out;
}

Tensor sinkhorn_apply(const Tensor& cost, const std::optional<Tensor>& a, const std::optional<Tensor>& b,
                      const Tensor& epsilon, const Tensor& f, const Tensor& g, const Tensor& v) {
  const Shape shape = shape_of_matrix(cost, "sinkhorn_apply");
  const DeviceScope scope(cost);
  return with_statistics(cost, [&](auto zero) {
    using T = decltype(zero);
    return apply_to<T>(shape, apply_of<T>(shape, pairs_of_matrix<T>(cost), a, b, epsilon, f, g), v);
  });
}

Tensor sinkhorn_points_apply(const Tensor& x, const Tensor& y, const std::optional<Tensor>& a,
                             const std::optional<Tensor>& b, const Tensor& epsilon, const Tensor& f, const Tensor& g,
                             const Tensor& v, const std::optional<Tensor>& h, const std::optional<Tensor>& k,
                             const std::string& cost, std::optional<double>, std::optional<double>,
                             bool over_distance) {
  const Shape shape = shape_of_points(x, y, "sinkhorn_points_apply");
  require(h.has_value() == k.has_value(), shape.op, "expected h and k together");
  require(!over_distance || cost == "euclidean", shape.op, "expected over_distance with cost 'euclidean' alone");
  const DeviceScope scope(x);
  return with_statistics(x, [&](auto zero) {
    using T = decltype(zero);
    SinkhornApply<T> call = apply_of<T>(shape, pairs_of_points<T>(shape, x, y, cost), a, b, epsilon, f, g);
    call.over_distance = over_distance;
    if (h.has_value()) {
      require(h->dim() == 3, shape.op, "expected h to have shape (batch, rows, weights), got ", shape_of(*h));
      call.weights = h->size(2);
      call.h = shape.dense<T>(*h, {shape.batch, shape.rows, call.weights}, "h");
      call.k = shape.dense<T>(*k, {shape.batch, shape.columns, call.weights}, "k");
    }
    return apply_to<T>(shape, call, v);
  });
}

Shape unrolled_shape(const Tensor& cost, int64_t max_iter, const char* op) {
  const Shape shape = shape_of_matrix(cost, op);
  require(max_iter >= 1 && max_iter <= kMaxUnrolled, op, "expected max_iter to be in [1, ", kMaxUnrolled, "], got ",
          max_iter);
  require(shape.rows <= kSmall && shape.columns <= kSmall, op, "expected cost to have at most ", kSmall,
          " rows and columns, got shape ", shape_of(cost));
  return shape;
}

std::tuple<Tensor, Tensor> sinkhorn_unrolled(const Tensor& cost, const Tensor& a, const Tensor& b,
                                             const Tensor& epsilon, int64_t max_iter, std::optional<double> rho_a,
                                             std::optional<double> rho_b) {
  const Shape shape = unrolled_shape(cost, max_iter, "sinkhorn_unrolled");
  const DeviceScope scope(cost);
  return with_statistics(cost, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const Solved solved = solve<T>(shape, pairs_of_matrix<T>(cost), a, b, epsilon, {}, {}, {},
                                   {max_iter, -1.0, rho_a, rho_b, 0.5, false});
    return {std::get<0>(solved), std::get<1>(solved)};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sinkhorn_unrolled_backward(const Tensor& grad_f, const Tensor& grad_g,
                                                                      const Tensor& cost, const Tensor& a,
                                                                      const Tensor& b, const Tensor& epsilon,
                                                                      int64_t max_iter, std::optional<double> rho_a,
                                                                      std::optional<double> rho_b) {
  const Shape shape = unrolled_shape(cost, max_iter, "sinkhorn_unrolled_backward");
  const auto [_, op, batch, rows, columns] = shape;
  const DeviceScope scope(cost);
  const auto output = [&](std::vector<int64_t> sizes) {
    return torch::stable::new_empty(cost, sizes, cost.scalar_type());
  };
  const Tensor grad_cost = output({batch, rows, columns}), grad_a = output({batch, rows});
  const Tensor grad_b = output({batch, columns}), grad_epsilon = output({batch});
  with_statistics(cost, [&](auto zero) {
    using T = decltype(zero);
    SinkhornUnrolled<T> call{.pairs = pairs_of_matrix<T>(cost)};
    call.a = shape.dense<T>(a, {shape.batch, shape.rows}, "a");
    call.b = shape.dense<T>(b, {shape.batch, shape.columns}, "b");
    call.epsilon = shape.dense<T>(epsilon, {shape.batch}, "epsilon");
    call.rho_a = penalty<T>(rho_a, shape.op, "rho_a");
    call.rho_b = penalty<T>(rho_b, shape.op, "rho_b");
    call.max_iter = max_iter;
    call.grad_f = shape.dense<T>(grad_f, {shape.batch, shape.rows}, "grad_f");
    call.grad_g = shape.dense<T>(grad_g, {shape.batch, shape.columns}, "grad_g");
    call.grad_cost = static_cast<T*>(grad_cost.data_ptr());
    call.grad_a = static_cast<T*>(grad_a.data_ptr());
    call.grad_b = static_cast<T*>(grad_b.data_ptr());
    call.grad_epsilon = static_cast<T*>(grad_epsilon.data_ptr());
    if (shape.batch > 0) run_unrolled(call, shape);
  });
  return {grad_cost, grad_a, grad_b, grad_epsilon};
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_IMPL(tilewise, TILEWISE_DISPATCH_KEY, m) {
  TILEWISE_IMPL(m, "sinkhorn", tilewise::sinkhorn);
  TILEWISE_IMPL(m, "sinkhorn_points", tilewise::sinkhorn_points);
  TILEWISE_IMPL(m, "sinkhorn_plan", tilewise::sinkhorn_plan);
  TILEWISE_IMPL(m, "sinkhorn_apply", tilewise::sinkhorn_apply);
  TILEWISE_IMPL(m, "sinkhorn_points_apply", tilewise::sinkhorn_points_apply);
  TILEWISE_IMPL(m, "sinkhorn_unrolled", tilewise::sinkhorn_unrolled);
  TILEWISE_IMPL(m, "sinkhorn_unrolled_backward", tilewise::sinkhorn_unrolled_backward);
}
