// The way back through all iterations of problems of at most 64 x 64, on CUDA.
#include "sinkhorn/small_problem.cuh"

namespace tilewise {
namespace {

// Potentials that iterations leave. They are read in turn by the lanes of a problem, or by problems of a lane each.
class History {
 public:
  template <typename Holder>
  __device__ __forceinline__ History(const Holder& problem, const SinkhornUnrolled<float>& call, float* history)
      : rows_(problem.rows()), columns_(problem.columns()) {
    const int64_t width = call.pairs.rows + call.pairs.columns;
    stride_ = Holder::kLanes == 1 ? call.pairs.batch : 1;
    step_ = width * stride_;
    f_ = history + (Holder::kLanes == 1 ? problem.index() : problem.index() * call.max_iter * width);
    g_ = f_ + call.pairs.rows * stride_;
  }

  template <typename Holder, typename Line>
  __device__ __forceinline__ void store(const Holder& problem, int64_t t, const Line& f, const Line& g) const {
    problem.each_line([&](int u, int i) {
      if (i < rows_) f_[t * step_ + i * stride_] = f.value[u];
      if (i < columns_) g_[t * step_ + i * stride_] = g.value[u];
    });
  }
  template <typename Holder>
  __device__ __forceinline__ auto f(const Holder& problem, int64_t t) const {
    return load(problem, f_, rows_, t);
  }
  // 0 before the first.
  template <typename Holder>
  __device__ __forceinline__ auto g(const Holder& problem, int64_t t) const {
    return load(problem, g_, t < 0 ? 0 : columns_, t);
  }

 private:
  template <typename Holder>
  __device__ __forceinline__ auto load(const Holder& problem, const float* from, int size, int64_t t) const {
    typename Holder::Line lines;
    problem.each_line([&](int u, int i) { lines.value[u] = i < size ? from[t * step_ + i * stride_] : 0.0f; });
    return lines;
  }

  int rows_, columns_;
  int64_t stride_, step_;
  float *f_, *g_;
};

template <int kLines>
__device__ __forceinline__ Lines<kLines> sum_of(const Lines<kLines>& x, const Lines<kLines>& y) {
  Lines<kLines> sum;
#pragma unroll
  for (int u = 0; u < kLines; ++u) sum.value[u] = x.value[u] + y.value[u];
  return sum;
}
template <int kLines>
__device__ __forceinline__ Lines<kLines> scaled(float factor, const Lines<kLines>& x) {
  Lines<kLines> product;
#pragma unroll
  for (int u = 0; u < kLines; ++u) product.value[u] = factor * x.value[u];
  return product;
}

// Of a multiprocessor, at least: 128 registers a thread, or where lanes have two lines, of which shared memory leaves
// few, as many as they want. A thread with a problem fits by itself but on sm_100; older architectures, told so, spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kTellsSingle = true;
#else
constexpr bool kTellsSingle = false;
#endif
template <typename Holder>
constexpr int kBlocks = Holder::kLines == 1 || (Holder::kLanes == 1 && kTellsSingle) ? 512 / Holder::kThreads : 1;

// The iterations again, their potentials kept, and the way back. Inside, potentials are in units of epsilon ln 2, their
// gradients in those of epsilon, and W are the gradients of the scores that a step leaves:
//
//   g_j = -d log sum_i a_i exp(S_ij + f_i):   W_ij = -d g_bar_j a_i exp(S_ij + f_i) / sum   f_bar_i += sum_j W_ij
template <typename Holder>
__global__ void __launch_bounds__(Holder::kThreads, kBlocks<Holder>)
    unrolled_kernel(const __grid_constant__ SinkhornUnrolled<float> call, float* memory) {
  using Line = typename Holder::Line;
  Holder problem(call.pairs, dynamic_shared());
  const int64_t index = problem.index();
  const int rows = problem.rows(), columns = problem.columns();
  const Line a = problem.load(call.a, rows), b = problem.load(call.b, columns);
  const float epsilon = problem.live() ? call.epsilon[index] : 1.0f, factor = -kLog2E / epsilon;
  const float damp_a = damping(call.rho_a, epsilon), damp_b = damping(call.rho_b, epsilon);
  const History history(problem, call, memory);

  Line f, g;
  const Line log_a = log2_of(a), log_b = log2_of(b);
  for (int64_t t = 0; t < call.max_iter; ++t) {
    const Line row_sums = problem.row_sums(sum_of(g, log_b), factor);
    problem.each_line([&](int u, int) { f.value[u] = updated(row_sums.value[u], damp_a); });
    const Line column_sums = problem.column_sums(sum_of(f, log_a), factor);
    problem.each_line([&](int u, int) { g.value[u] = updated(column_sums.value[u], damp_b); });
    history.store(problem, t, f, g);
  }

  Line f_bar = problem.load(call.grad_f, rows), g_bar = problem.load(call.grad_g, columns);
  Line a_bar, b_bar;
  float along_potentials = 0.0f;  // d epsilon / ln 2 of this lane
  problem.each_line([&](int u, int) {
    along_potentials += f_bar.value[u] * f.value[u] + g_bar.value[u] * g.value[u];
    f_bar.value[u] *= epsilon;
    g_bar.value[u] *= epsilon;
  });
  // d log d = -1 / (rho + epsilon)
  const float of_damp_a = call.rho_a < infinity<float>() ? 1.0f / (call.rho_a + epsilon) : 0.0f;
  const float of_damp_b = call.rho_b < infinity<float>() ? 1.0f / (call.rho_b + epsilon) : 0.0f;
  for (int64_t t = call.max_iter - 1; t >= 0; --t) {
    f = history.f(problem, t);
    problem.each_line([&](int u, int) { along_potentials -= of_damp_b * g_bar.value[u] * g.value[u]; });
    const Line of_a = problem.pull_columns(f, a, factor, scaled(-damp_b, g_bar));
    g = history.g(problem, t - 1);
    problem.each_line([&](int u, int) {
      a_bar.value[u] += of_a.value[u];
      f_bar.value[u] = fmaf(a.value[u], of_a.value[u], f_bar.value[u]);
      along_potentials -= of_damp_a * f_bar.value[u] * f.value[u];
    });
    const Line of_b = problem.pull_rows(g, b, factor, scaled(-damp_a, f_bar));
    problem.each_line([&](int u, int) {
      b_bar.value[u] += of_b.value[u];
      g_bar.value[u] = b.value[u] * of_b.value[u];
    });
    f_bar = {};
  }
  float epsilon_bar = kLn2 * along_potentials;
  problem.each_gradient([&](int i, int j, float cost, float of_score) {
    const float gradient = -of_score / epsilon;
    call.grad_cost[(index * rows + i) * columns + j] = gradient;
    if (cost < infinity<float>()) epsilon_bar -= gradient * cost / epsilon;
  });
  problem.store(call.grad_a, rows, a_bar);
  problem.store(call.grad_b, columns, b_bar);
  epsilon_bar = problem.sum(epsilon_bar);
  if (problem.live() && problem.lane() == 0) call.grad_epsilon[index] = epsilon_bar;
}

}  // namespace

const char* sinkhorn_unrolled_cuda(const SinkhornUnrolled<float>& call, float* history, void* stream) {
  return with_holder<true>(call.pairs, [&](auto holder) {
    using Holder = typename decltype(holder)::type;
    return launch(unrolled_kernel<Holder>, grid_of<Holder>(call.pairs), dim3(Holder::kThreads),
                  Holder::kSharedFloats * sizeof(float), stream, call, history);
  });
}

}  // namespace tilewise
