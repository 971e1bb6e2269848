// Problems of at most 64 x 64 on CUDA: all iterations, forward and back, in one kernel each.
//
// A problem has min(K, 32) lanes of a warp, K the power of two from 4 on that holds its rows and columns; lane l has
// the lines (a row and a column) l and l + 32. Costs lie in shared memory with a pitch of K + 1, so that rows and
// columns are both read without conflicts; a lane reads its row, then its column, and the other side's potentials.
#include "common/team.cuh"
#include "sinkhorn/sinkhorn_launch.h"

namespace tilewise {
namespace {

template <int K>
struct Shape {
  static constexpr int kLanes = K < kWarp ? K : kWarp;
  static constexpr int kLines = K / kLanes;
  static constexpr int kThreads = K < kWarp ? 128 : kWarp;
  static constexpr int kProblems = kThreads / kLanes;  // of a block
  static constexpr int kPitch = K + 1;
  static constexpr int kMatrix = K * kPitch;
};

// One side of a problem as its lanes hold it: a line each, or two.
template <int kLines>
struct Lines {
  float value[kLines] = {};
};

// The lanes of one problem. What they write to shared memory others may read after sync().
template <int K>
class Group {
 public:
  static constexpr int kLines = Shape<K>::kLines;

  __device__ Group(const Pairs<float>& pairs, float* shared, int matrices)
      : problem_(flat_block() * Shape<K>::kProblems + threadIdx.x / Shape<K>::kLanes),
        live_(problem_ < pairs.batch),
        rows_(live_ ? static_cast<int>(pairs.rows) : 0),
        columns_(live_ ? static_cast<int>(pairs.columns) : 0),
        lane_(threadIdx.x % Shape<K>::kLanes) {
    costs_ = shared + threadIdx.x / Shape<K>::kLanes * floats(matrices);
    row_offsets_ = costs_ + matrices * Shape<K>::kMatrix;
    column_offsets_ = row_offsets_ + K;
  }

  static __host__ __device__ constexpr int floats(int matrices) { return matrices * Shape<K>::kMatrix + 2 * K; }

  __device__ int64_t problem() const { return problem_; }
  __device__ bool live() const { return live_; }
  __device__ int rows() const { return rows_; }
  __device__ int columns() const { return columns_; }
  __device__ int line(int u) const { return lane_ + u * Shape<K>::kLanes; }
  __device__ bool is_first_lane() const { return lane_ == 0; }
  __device__ void sync() const { __syncwarp(); }

  __device__ float* matrix(int index) const { return costs_ + index * Shape<K>::kMatrix; }
  __device__ float* row_offsets() const { return row_offsets_; }
  __device__ float* column_offsets() const { return column_offsets_; }

  template <typename Function>
  __device__ __forceinline__ void each_line(Function f) const {
#pragma unroll
    for (int u = 0; u < kLines; ++u) f(u, line(u));
  }

  __device__ Lines<kLines> load(const float* values, int size, float outside) const {
    Lines<kLines> lines;
    each_line([&](int u, int i) { lines.value[u] = i < size ? values[problem_ * size + i] : outside; });
    return lines;
  }
  __device__ Lines<kLines> load_log(const float* values, int size) const {
    Lines<kLines> lines = load(values, size, 0.0f);
    each_line([&](int u, int) { lines.value[u] = ::logf(lines.value[u]); });
    return lines;
  }
  __device__ void store(float* values, int size, const Lines<kLines>& lines) const {
    each_line([&](int u, int i) {
      if (i < size) values[problem_ * size + i] = lines.value[u];
    });
  }

  // Sum of one number of every lane.
  __device__ float sum(float value) const { return over_lanes<Shape<K>::kLanes>(value, Plus{}); }
  __device__ float sum(const Lines<kLines>& lines) const {
    float total = 0.0f;
    each_line([&](int u, int) { total += lines.value[u]; });
    return sum(total);
  }

  __device__ void load_costs(const Pairs<float>& pairs) const {
    for (int i = lane_; i < K * K; i += Shape<K>::kLanes) {
      const int row = i / K, column = i % K;
      costs_[row * Shape<K>::kPitch + column] =
          row < rows_ && column < columns_ ? cost_of(pairs, row, column) : infinity<float>();
    }
  }

 private:
  __device__ float cost_of(const Pairs<float>& pairs, int row, int column) const {
    if (pairs.is_matrix())
      return pairs.matrix[problem_ * pairs.batch_stride + row * pairs.row_stride + column * pairs.column_stride];
    const float* x = pairs.x + (problem_ * pairs.rows + row) * pairs.features;
    const float* y = pairs.y + (problem_ * pairs.columns + column) * pairs.features;
    return with_cost(pairs.cost, [&](auto cost) {
      float z = 0.0f;
      if constexpr (!kIsMatrix<decltype(cost)>) {
        for (int64_t k = 0; k < pairs.features; ++k) z = cost.accumulate(z, x[k], y[k]);
        z = cost.finish(z);
      }
      return z;
    });
  }

  int64_t problem_;
  bool live_;
  int rows_, columns_, lane_;
  float *costs_, *row_offsets_, *column_offsets_;
};

__device__ __forceinline__ float finite(float top) { return top > -infinity<float>() ? top : 0.0f; }

// log sum_k exp(factor costs_k + offsets_k) along a row (stride 1) or a column (stride pitch).
template <int K>
__device__ __forceinline__ float log_sum_exp(const float* costs, int stride, const float* offsets, float factor) {
  float score[K];
  float top = -infinity<float>();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    score[k] = fmaf(factor, costs[k * stride], offsets[k]);
    top = fmaxf(top, score[k]);
  }
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) sum += fast_exp(score[k] - finite(top));
  return sum == 0.0f ? -infinity<float>() : top + ::logf(sum);
}

// -d log sum, 0 where every pair of a row is forbidden
__device__ __forceinline__ float updated(float lse, float damp) {
  return lse == -infinity<float>() ? 0.0f : -damp * lse;
}

template <int K>
__global__ void __launch_bounds__(Shape<K>::kThreads) small_kernel(const __grid_constant__ SinkhornCall<float> call) {
  const Group<K> group(call.pairs, static_cast<float*>(dynamic_shared()), 1);
  constexpr int kLines = Group<K>::kLines;
  const int rows = group.rows(), columns = group.columns();
  group.load_costs(call.pairs);
  Lines<kLines> f = group.load(call.f, rows, 0.0f), g = group.load(call.g, columns, 0.0f);
  const Lines<kLines> a = group.load(call.a, rows, 0.0f);
  const Lines<kLines> log_a = group.load_log(call.a, rows), log_b = group.load_log(call.b, columns);
  const float mass = group.sum(a);
  const float epsilon = group.live() ? call.epsilon[group.problem()] : 1.0f;
  const Schedule<float> schedule{epsilon, call.tol, call.scaling, call.max_iter, call.start != nullptr, call.symmetric};
  Stage<float> stage = schedule.first(group.live() && call.start != nullptr ? call.start[group.problem()] : epsilon);
  float error = 0.0f;
  int64_t n_iter = 0;
  bool going = true;
  // What comes after the last iteration is for its error alone.
  for (int64_t t = 0; __any_sync(0xffffffffu, going); ++t) {
    if (going && t == call.max_iter) stage = {epsilon};
    const float now = stage.epsilon, inverse = 1.0f / now, step = call.symmetric ? 0.5f : stage.step;
    const bool averages = stage.averages();
    const auto moved = [&](float from, float to) { return step == 1.0f ? to : fmaf(step, to - from, from); };
    group.each_line([&](int u, int j) { group.column_offsets()[j] = fmaf(g.value[u], inverse, log_b.value[u]); });
    group.sync();
    float wrong = 0.0f;
    Lines<kLines> new_f, new_g;
    group.each_line([&](int u, int i) {
      const float lse = log_sum_exp<K>(group.matrix(0) + i * Shape<K>::kPitch, 1, group.column_offsets(), -inverse);
      if (a.value[u] > 0.0f) {
        const float scaled = f.value[u] * inverse;
        wrong += a.value[u] * fabsf(::expf(scaled + lse) - target_ratio(scaled, now, call.rho_a));
      }
      new_f.value[u] = moved(f.value[u], now * updated(lse, damping(call.rho_a, now)));
      group.row_offsets()[i] = fmaf(averages ? f.value[u] : new_f.value[u], inverse, log_a.value[u]);
    });
    wrong = group.sum(wrong);
    const bool counted = going;
    if (going) {
      error = mass > 0.0f ? wrong / mass : 0.0f;
      going = group.live() && t < call.max_iter && !schedule.stops(stage, error, t);
      if (going) stage = schedule.next(stage, error, t);
    }
    group.sync();
    group.each_line([&](int u, int j) {
      const float lse = log_sum_exp<K>(group.matrix(0) + j, Shape<K>::kPitch, group.row_offsets(), -inverse);
      new_g.value[u] =
          call.symmetric ? new_f.value[u] : moved(g.value[u], now * updated(lse, damping(call.rho_b, now)));
    });
    // In the end g of a symmetric problem is the update of f, of which new_f is the mean with f.
    if (counted && !going && call.symmetric)
      group.each_line([&](int u, int) { g.value[u] = 2.0f * new_f.value[u] - f.value[u]; });
    if (!going) continue;
    f = new_f;
    g = new_g;
    n_iter = t + 1;
  }
  group.store(call.f, rows, f);
  group.store(call.g, columns, g);
  if (!group.live() || !group.is_first_lane()) return;
  call.error[group.problem()] = error;
  call.n_iter[group.problem()] = n_iter;
}

// softmax(scores + log marginal) / marginal along a line, times upstream, into `out`; its scores are factor costs +
// offsets. A term without its marginal, which may be 0, may be too large: a finite one times 0 is 0.
template <int K>
__device__ __forceinline__ void pull(const float* costs, int stride, const float* offsets, const float* marginal,
                                     float factor, float upstream, float* out) {
  float score[K];
  float top = -infinity<float>();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    score[k] = fmaf(factor, costs[k * stride], offsets[k]);
    if (marginal[k] > 0.0f) top = fmaxf(top, score[k]);
  }
  float total = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    score[k] = fast_exp(fminf(score[k] - finite(top), 80.0f));
    total += marginal[k] * score[k];
  }
  const float scale = total > 0.0f ? upstream / total : 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) out[k * stride] = score[k] * scale;
}

// The iterations again, their potentials kept in history (batch, max_iter, rows + columns), and the way back. Inside,
// potentials and their gradients are in units of epsilon, and W are the gradients of the scores that a step leaves:
//
//   g_j = -d log sum_i a_i exp(S_ij + f_i):   W_ij = -d g_bar_j a_i exp(S_ij + f_i) / sum   f_bar_i += sum_j W_ij
//
// Matrices: costs, the sum of all W, and W / a (or W / b) of the step.
template <int K>
__global__ void __launch_bounds__(Shape<K>::kThreads)
    unrolled_kernel(const __grid_constant__ SinkhornUnrolled<float> call, float* history) {
  constexpr int kLines = Group<K>::kLines, kPitch = Shape<K>::kPitch;
  float* shared = static_cast<float*>(dynamic_shared());
  const Group<K> group(call.pairs, shared, 3);
  float* marginals = shared + Shape<K>::kProblems * Group<K>::floats(3) + threadIdx.x / Shape<K>::kLanes * 2 * K;
  float *const of_rows = marginals, *const of_columns = marginals + K;  // a and b
  const int rows = group.rows(), columns = group.columns();
  float *const costs = group.matrix(0), *const all = group.matrix(1), *const without = group.matrix(2);
  group.load_costs(call.pairs);
  const Lines<kLines> a = group.load(call.a, rows, 0.0f), b = group.load(call.b, columns, 0.0f);
  const Lines<kLines> log_a = group.load_log(call.a, rows), log_b = group.load_log(call.b, columns);
  group.each_line([&](int u, int i) {
    of_rows[i] = a.value[u];
    of_columns[i] = b.value[u];
    for (int k = 0; k < K; ++k) all[i * kPitch + k] = 0.0f;
  });
  const float epsilon = group.live() ? call.epsilon[group.problem()] : 1.0f, factor = -1.0f / epsilon;
  const float damp_a = damping(call.rho_a, epsilon), damp_b = damping(call.rho_b, epsilon);
  const int64_t width = rows + columns;
  history += group.problem() * call.max_iter * width;

  Lines<kLines> f, g;
  for (int64_t t = 0; t < call.max_iter; ++t) {
    group.each_line([&](int u, int j) { group.column_offsets()[j] = g.value[u] + log_b.value[u]; });
    group.sync();
    group.each_line([&](int u, int i) {
      f.value[u] = updated(log_sum_exp<K>(costs + i * kPitch, 1, group.column_offsets(), factor), damp_a);
      group.row_offsets()[i] = f.value[u] + log_a.value[u];
      if (i < rows) history[t * width + i] = f.value[u];
    });
    group.sync();
    group.each_line([&](int u, int j) {
      g.value[u] = updated(log_sum_exp<K>(costs + j, kPitch, group.row_offsets(), factor), damp_b);
      if (j < columns) history[t * width + rows + j] = g.value[u];
    });
  }
  group.sync();  // before offsets are written again

  Lines<kLines> f_bar = group.load(call.grad_f, rows, 0.0f), g_bar = group.load(call.grad_g, columns, 0.0f);
  Lines<kLines> a_bar, b_bar;
  float epsilon_bar = 0.0f;  // of this lane
  group.each_line([&](int u, int) {
    epsilon_bar += f_bar.value[u] * f.value[u] + g_bar.value[u] * g.value[u];
    f_bar.value[u] *= epsilon;
    g_bar.value[u] *= epsilon;
  });
  // d log d = -1 / (rho + epsilon)
  const float of_damp_a = call.rho_a < infinity<float>() ? 1.0f / (call.rho_a + epsilon) : 0.0f;
  const float of_damp_b = call.rho_b < infinity<float>() ? 1.0f / (call.rho_b + epsilon) : 0.0f;
  for (int64_t t = call.max_iter - 1; t >= 0; --t) {
    group.each_line([&](int u, int i) {
      f.value[u] = i < rows ? history[t * width + i] : 0.0f;
      group.row_offsets()[i] = f.value[u];
    });
    group.sync();
    group.each_line([&](int u, int j) {
      epsilon_bar -= of_damp_b * g_bar.value[u] * g.value[u];
      pull<K>(costs + j, kPitch, group.row_offsets(), of_rows, factor, -damp_b * g_bar.value[u], without + j);
    });
    group.sync();
    group.each_line([&](int u, int i) {
      float sum = 0.0f;
      for (int k = 0; k < K; ++k) {
        sum += without[i * kPitch + k];
        all[i * kPitch + k] = fmaf(a.value[u], without[i * kPitch + k], all[i * kPitch + k]);
      }
      a_bar.value[u] += sum;
      f_bar.value[u] = fmaf(a.value[u], sum, f_bar.value[u]);
      epsilon_bar -= of_damp_a * f_bar.value[u] * f.value[u];
      g.value[u] = t > 0 && i < columns ? history[(t - 1) * width + rows + i] : 0.0f;
      group.column_offsets()[i] = g.value[u];
    });
    group.sync();
    group.each_line([&](int u, int i) {
      pull<K>(costs + i * kPitch, 1, group.column_offsets(), of_columns, factor, -damp_a * f_bar.value[u],
              without + i * kPitch);
      for (int k = 0; k < K; ++k)
        all[i * kPitch + k] = fmaf(of_columns[k], without[i * kPitch + k], all[i * kPitch + k]);
      f_bar.value[u] = 0.0f;
    });
    group.sync();
    group.each_line([&](int u, int j) {
      float sum = 0.0f;
      for (int k = 0; k < K; ++k) sum += without[k * kPitch + j];
      b_bar.value[u] += sum;
      g_bar.value[u] = b.value[u] * sum;
    });
    group.sync();
  }
  group.each_line([&](int, int i) {
    for (int k = 0; k < columns; ++k) {
      const float gradient = all[i * kPitch + k] * factor, cost = costs[i * kPitch + k];
      if (i >= rows) continue;
      call.grad_cost[(group.problem() * rows + i) * columns + k] = gradient;
      if (cost < infinity<float>()) epsilon_bar -= gradient * cost / epsilon;
    }
  });
  group.store(call.grad_a, rows, a_bar);
  group.store(call.grad_b, columns, b_bar);
  epsilon_bar = group.sum(epsilon_bar);
  if (group.live() && group.is_first_lane()) call.grad_epsilon[group.problem()] = epsilon_bar;
}

template <typename Function>
const char* with_size(const Pairs<float>& pairs, Function f) {
  const int64_t size = pairs.rows > pairs.columns ? pairs.rows : pairs.columns;
  if (size <= 4) return f(std::integral_constant<int, 4>{});
  if (size <= 8) return f(std::integral_constant<int, 8>{});
  if (size <= 16) return f(std::integral_constant<int, 16>{});
  if (size <= 32) return f(std::integral_constant<int, 32>{});
  return f(std::integral_constant<int, kSmall>{});
}

template <int K>
dim3 grid_of(const Pairs<float>& pairs) {
  return flat_grid((pairs.batch + Shape<K>::kProblems - 1) / Shape<K>::kProblems);
}

}  // namespace

const char* sinkhorn_small_cuda(const SinkhornCall<float>& call, void* stream) {
  return with_size(call.pairs, [&](auto size) {
    constexpr int K = decltype(size)::value;
    const size_t floats = Shape<K>::kProblems * Group<K>::floats(1);
    return launch(small_kernel<K>, grid_of<K>(call.pairs), dim3(Shape<K>::kThreads), floats * sizeof(float), stream,
                  call);
  });
}

const char* sinkhorn_unrolled_cuda(const SinkhornUnrolled<float>& call, float* history, void* stream) {
  return with_size(call.pairs, [&](auto size) {
    constexpr int K = decltype(size)::value;
    constexpr size_t floats = Shape<K>::kProblems * (Group<K>::floats(3) + 2 * K);
    static_assert(floats * sizeof(float) <= 99 << 10, "the shared memory of a block on compute capability 8.6 to 12.0");
    return launch(unrolled_kernel<K>, grid_of<K>(call.pairs), dim3(Shape<K>::kThreads), floats * sizeof(float), stream,
                  call, history);
  });
}

}  // namespace tilewise
