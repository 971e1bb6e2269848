// Sinkhorn on CUDA, in the log domain: a block has a strip of 64 rows and walks over its tiles (pairs.cuh). Potentials
// in memory are in units of the cost, so that they stay what they are while epsilon falls. Matrices have their own
// half-steps (matrix_half_step_cuda.cu), and so do points of many features (product_half_step_cuda.cu).
#include "sinkhorn/half_step.cuh"
#include "sinkhorn/pairs.cuh"

namespace tilewise {
namespace {

template <typename Cost>
__global__ void __launch_bounds__(kThreads) half_step_kernel(const __grid_constant__ SinkhornHalfStep step) {
  float* shared = static_cast<float*>(dynamic_shared());
  float* offsets = shared + kTile * kPitch;  // 2 x 64, in turn
  float* sums = offsets + 2 * kTile;         // one for every warp
  const Pairs<float>& pairs = step.pairs;
  const int64_t tiles = row_tiles(pairs.rows);
  const int64_t problem = flat_block() / tiles, tile = flat_block() % tiles;
  if (problem >= pairs.batch) return;
  // t, or already t + 1 where the first block of the problem has decided: that it goes on, either way.
  if (read_relaxed(step.decision.n_iter + problem) < step.decision.t) return;
  if (step.own == nullptr && !goes_on(step.decision, problem, tile == 0, sums)) return;
  const Stage<float> stage = stage_of(step.decision, problem);
  const float now = stage.epsilon, inverse = 1.0f / now, factor = factor_of<Cost>(inverse);
  const int64_t row = tile * kTile;
  const Side side{stage.averages() ? step.averaged_from : step.from, step.y_squares, step.other};
  float top[4], total[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) top[r] = -infinity<float>(), total[r] = 0.0f;
  for (int64_t column = 0, turn = 0; column < pairs.columns; column += kTile, turn ^= 1) {
    float* own_offsets = offsets + turn * kTile;
    stage_offsets(side, problem * pairs.columns + column, pairs.columns - column, inverse, own_offsets);
    float z[4][4];
    load_pairs<Cost>(pairs, problem, row, column, shared, z);
    const Quad offset = load_quad(own_offsets + own_column());
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float above = top[r];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        z[r][c] = fmaf(factor, z[r][c], offset.value[c]);
        above = fmaxf(above, z[r][c]);
      }
      const float finite = above > -infinity<float>() ? above : 0.0f;
      float sum = total[r] * fast_exp(top[r] - finite);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum += fast_exp(z[r][c] - finite);
      top[r] = above;
      total[r] = sum;
    }
  }
  float error = 0.0f;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    over_row_threads([&](int lanes) { merge_over_lanes(top[r], total[r], lanes); });
    const int64_t i = row + own_row() + r;
    if (threadIdx.x % 16 != 0 || i >= pairs.rows) continue;
    error += finish_row(step, stage, problem, i, top[r], total[r]);
  }
  if (step.own == nullptr) return;
  error = Team(sums).all_sum(error);
  if (threadIdx.x == 0) step.partials[problem * tiles + tile] = error;
}

// |x|^2, a warp for each point.
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const float* points, int64_t count, int64_t features, float* squares) {
  const int64_t point = flat_block() * blockDim.y + threadIdx.y;
  if (point >= count) return;
  const Team team(nullptr);
  float sum = 0.0f;
  for (int64_t k = team.rank(); k < features; k += team.size()) {
    const float x = points[point * features + k];
    sum = fmaf(x, x, sum);
  }
  sum = team.all_sum(sum);
  if (team.first()) squares[point] = sum;
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ SinkhornPrepare prepare) {
  const SinkhornCall<float>& call = prepare.call;
  const int64_t problem = flat_block();
  if (problem >= call.pairs.batch) return;
  for (int64_t i = threadIdx.x; i < prepare.tickets_of_problem; i += kThreads)
    prepare.tickets[problem * prepare.tickets_of_problem + i] = 0;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < call.pairs.rows; i += kThreads) sum += call.a[problem * call.pairs.rows + i];
  sum = Team(dynamic_shared()).all_sum(sum);
  if (threadIdx.x != 0) return;
  prepare.mass[problem] = static_cast<float>(sum);
  call.n_iter[problem] = 0;
  if (prepare.stages == nullptr) return;
  const Schedule<float> schedule{call.epsilon[problem], call.tol, call.scaling, call.max_iter, true, call.symmetric};
  prepare.stages[problem] = schedule.first(call.start[problem]);
}

__global__ void __launch_bounds__(kThreads)
    decide_kernel(const __grid_constant__ SinkhornDecision decision, int64_t batch) {
  const int64_t problem = flat_block();
  if (problem >= batch || decision.n_iter[problem] < decision.t) return;
  goes_on(decision, problem, true, static_cast<float*>(dynamic_shared()));
}

__global__ void __launch_bounds__(kThreads, 4) finish_kernel(const __grid_constant__ SinkhornFinish finish) {
  const SinkhornCall<float>& call = finish.call;
  const int64_t problem = flat_block(), rows = call.pairs.rows, columns = call.pairs.columns;
  if (problem >= call.pairs.batch) return;
  const Team team(dynamic_shared());
  const bool copies = call.n_iter[problem] % 2 != 0;
  ValueSums sums;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const int64_t at = problem * rows + i;
    const float here = call.f[at], there = finish.second[at];
    const float f = copies ? there : here;
    if (copies) call.f[at] = f;
    // The other buffer has the mean of f and its update.
    if (call.symmetric) call.g[at] = 2.0f * (copies ? here : there) - f;
    sums.add_row(call.a[at], f, call.rho_a);
  }
  __syncthreads();
  for (int64_t j = threadIdx.x; j < columns; j += kThreads) {
    const int64_t at = problem * columns + j;
    sums.add_column(call.b[at], call.g[at], call.rho_b);
  }
  sums = {team.all_sum(sums.dual), team.all_sum(sums.of_a), team.all_sum(sums.of_b), team.all_sum(sums.mass)};
  if (threadIdx.x == 0) call.value[problem] = static_cast<float>(sums.value(call.epsilon[problem]));
  if (call.n_iter[problem] != call.max_iter) return;
  const float error = total_error(finish.decision, problem, static_cast<float*>(dynamic_shared()));
  if (threadIdx.x == 0) call.error[problem] = error;
}

}  // namespace

const char* sinkhorn_squares_cuda(const float* points, int64_t count, int64_t features, float* squares, void* stream) {
  constexpr int kPoints = kThreads / kWarp;
  return launch(squares_kernel, flat_grid((count + kPoints - 1) / kPoints), dim3(kWarp, kPoints), 0, stream, points,
                count, features, squares);
}

const char* sinkhorn_prepare_cuda(const SinkhornPrepare& prepare, void* stream) {
  return launch(prepare_kernel, flat_grid(prepare.call.pairs.batch), dim3(kThreads), kThreads / kWarp * sizeof(double),
                stream, prepare);
}

const char* sinkhorn_half_step_cuda(const SinkhornHalfStep& step, void* stream) {
  const int64_t blocks = step.pairs.batch * row_tiles(step.pairs.rows);
  const size_t floats = kTile * (kPitch + 2) + kThreads / kWarp;
  return with_cost(step.pairs.cost, [&](auto cost) {
    using Cost = decltype(cost);
    if constexpr (kIsMatrix<Cost>) {
      return sinkhorn_matrix_half_step_cuda(step, stream);
    } else {
      if (Cost::kByProducts && step.pairs.features >= kProductFeatures)
        return sinkhorn_product_half_step_cuda(step, stream);
      return launch(half_step_kernel<Cost>, flat_grid(blocks), dim3(kThreads), floats * sizeof(float), stream, step);
    }
  });
}

const char* sinkhorn_decide_cuda(const SinkhornDecision& decision, int64_t batch, void* stream) {
  return launch(decide_kernel, flat_grid(batch), dim3(kThreads), kThreads / kWarp * sizeof(float), stream, decision,
                batch);
}

const char* sinkhorn_finish_cuda(const SinkhornFinish& finish, void* stream) {
  return launch(finish_kernel, flat_grid(finish.call.pairs.batch), dim3(kThreads), kThreads / kWarp * sizeof(double),
                stream, finish);
}

}  // namespace tilewise
