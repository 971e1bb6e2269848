// Problems of at most 64 x 64 on CUDA: all iterations and what is said of them, in one kernel.
#include "sinkhorn/small_problem.cuh"

namespace tilewise {
namespace {

// What is the same as long as epsilon is. Potentials are in units of the cost, offsets and sums in those of log2.
struct Units {
  __device__ Units(float epsilon, const SinkhornCall<float>& call)
      : epsilon(epsilon),
        inverse(kLog2E / epsilon),
        of_rows(epsilon * kLn2 * damping(call.rho_a, epsilon)),
        of_columns(epsilon * kLn2 * damping(call.rho_b, epsilon)) {}

  float epsilon;
  float inverse;
  float of_rows, of_columns;  // of an update, with its damping
};

template <int kLines>
__device__ __forceinline__ Lines<kLines> offsets_of(const Lines<kLines>& potential, float inverse,
                                                    const Lines<kLines>& log_marginal) {
  Lines<kLines> offsets;
#pragma unroll
  for (int u = 0; u < kLines; ++u) offsets.value[u] = fmaf(potential.value[u], inverse, log_marginal.value[u]);
  return offsets;
}

template <int kLines>
__device__ __forceinline__ Lines<kLines> stepped(const Lines<kLines>& from, const Lines<kLines>& sums, float unit,
                                                 float step) {
  Lines<kLines> result;
#pragma unroll
  for (int u = 0; u < kLines; ++u) {
    const float to = updated(sums.value[u], unit);
    result.value[u] = step == 1.0f ? to : fmaf(step, to - from.value[u], from.value[u]);
  }
  return result;
}

template <typename Holder>
__global__ void __launch_bounds__(Holder::kThreads) small_kernel(const __grid_constant__ SinkhornCall<float> call) {
  using Line = typename Holder::Line;
  const Holder problem(call.pairs, dynamic_shared());
  const int64_t index = problem.index();
  const int rows = problem.rows(), columns = problem.columns();
  Line f = problem.load(call.f, rows), g = problem.load(call.g, columns);
  const Line a = problem.load(call.a, rows);
  const Line log_a = log2_of(a), log_b = log2_of(problem.load(call.b, columns));
  float mass = 0.0f;
  problem.each_line([&](int u, int) { mass += a.value[u]; });
  mass = problem.sum(mass);
  const float epsilon = problem.live() ? call.epsilon[index] : 1.0f;
  const Schedule<float> schedule{epsilon, call.tol, call.scaling, call.max_iter, call.start != nullptr, call.symmetric};
  Stage<float> stage = schedule.first(problem.live() && call.start != nullptr ? call.start[index] : epsilon);
  Units units(stage.epsilon, call);
  const bool is_penalty = call.rho_a < infinity<float>();
  const float to_target = -kLog2E / call.rho_a;
  float error = 0.0f;
  int64_t n_iter = 0;
  bool going = true;
  // What comes after the last iteration is for its error alone.
  for (int64_t t = 0; problem.any(going); ++t) {
    if (going && t == call.max_iter) stage = {epsilon};
    if (stage.epsilon != units.epsilon) units = Units(stage.epsilon, call);
    const float step = call.symmetric ? 0.5f : stage.step;
    const Line row_sums = problem.row_sums(offsets_of(g, units.inverse, log_b), -units.inverse);
    float wrong = 0.0f;
    problem.each_line([&](int u, int) {
      const float ratio = is_penalty ? fast_exp2(f.value[u] * to_target) : 1.0f;
      const float off = a.value[u] * fabsf(fast_exp2(fmaf(f.value[u], units.inverse, row_sums.value[u])) - ratio);
      if (a.value[u] > 0.0f) wrong += off;
    });
    wrong = problem.sum(wrong);
    const Line new_f = stepped(f, row_sums, units.of_rows, step);
    const Line seen = stage.averages() ? f : new_f;
    const bool counted = going;
    if (going) {
      error = mass > 0.0f ? wrong / mass : 0.0f;
      going = problem.live() && t < call.max_iter && !schedule.stops(stage, error, t);
      if (going) stage = schedule.next(stage, error, t);
    }
    Line new_g = new_f;
    if (!call.symmetric) {
      const Line sums = problem.column_sums(offsets_of(seen, units.inverse, log_a), -units.inverse);
      new_g = stepped(g, sums, units.of_columns, step);
    }
    // In the end g of a symmetric problem is the update of f, of which new_f is the mean with f.
    if (counted && !going && call.symmetric)
      problem.each_line([&](int u, int) { g.value[u] = 2.0f * new_f.value[u] - f.value[u]; });
    if (!going) continue;
    f = new_f;
    g = new_g;
    n_iter = t + 1;
  }
  problem.store(call.f, rows, f);
  problem.store(call.g, columns, g);
  const Line b = problem.load(call.b, columns);
  ValueSums sums;
  problem.each_line([&](int u, int) {
    sums.add_row(a.value[u], f.value[u], call.rho_a);
    sums.add_column(b.value[u], g.value[u], call.rho_b);
  });
  sums = {problem.sum(sums.dual), problem.sum(sums.of_a), problem.sum(sums.of_b), problem.sum(sums.mass)};
  if (!problem.live() || problem.lane() != 0) return;
  call.value[index] = static_cast<float>(sums.value(epsilon));
  call.error[index] = error;
  call.n_iter[index] = n_iter;
}

}  // namespace

const char* sinkhorn_small_cuda(const SinkhornCall<float>& call, void* stream) {
  return with_holder<false>(call.pairs, [&](auto holder) {
    using Holder = typename decltype(holder)::type;
    return launch(small_kernel<Holder>, grid_of<Holder>(call.pairs), dim3(Holder::kThreads),
                  Holder::kSharedFloats * sizeof(float), stream, call);
  });
}

}  // namespace tilewise
