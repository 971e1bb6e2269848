// Sinkhorn on CUDA, in the log domain: a block of 256 threads has a strip of 64 rows and walks over its 64 x 64 tiles.
//
// A thread has 4 x 4 pairs of a tile: rows 4 (t / 16) + r, columns 4 (t % 16) + c. Scores are factor z + hat_i + hat_j
// with hat = (potential - s) / epsilon + log marginal; potentials in memory are in units of the cost, so that they stay
// what they are while epsilon falls. Of matrices every half-step is one pass at the speed of memory, the exponential of
// an element hidden behind its load: keeping exp(scores), as the CPU does, would save nothing.
#include "common/launch.cuh"
#include "rows/rows.cuh"
#include "sinkhorn/sinkhorn_gpu.h"

namespace tilewise {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = kTileRows;
constexpr int kPitch = kTile + 4;  // of shared tiles: keeps groups of 4 on 16-byte boundaries
constexpr int kDepth = 32;         // features at a time

struct Quad {
  float value[4];
};

__device__ __forceinline__ Quad load_quad(const float* address) {
  const uint4 piece = *reinterpret_cast<const uint4*>(address);
  Quad quad;
  memcpy(&quad, &piece, sizeof(quad));
  return quad;
}

__device__ __forceinline__ int own_row() { return static_cast<int>(threadIdx.x) / 16 * 4; }
__device__ __forceinline__ int own_column() { return static_cast<int>(threadIdx.x) % 16 * 4; }

// The first `kDepth` features of up to 64 points from `first` on, by feature; 0 where there are none.
__device__ __forceinline__ void stage_points(const float* points, int64_t left, int64_t features, int64_t feature,
                                             float* out) {
  for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
    const int k = i % kDepth, point = i / kDepth;
    const bool inside = point < left && feature + k < features;
    out[k * kPitch + point] = inside ? points[point * features + feature + k] : 0.0f;
  }
}

// z += <x, y>, or |x - y|^2, over all features of a tile of points. shared: 2 kDepth kPitch.
template <bool kDifferences>
__device__ __forceinline__ void add_products(const float* x, const float* y, int64_t rows_left, int64_t columns_left,
                                             int64_t features, float* shared, float (&z)[4][4]) {
  float* of_x = shared;
  float* of_y = shared + kDepth * kPitch;
  for (int64_t feature = 0; feature < features; feature += kDepth) {
    stage_points(x, rows_left, features, feature, of_x);
    stage_points(y, columns_left, features, feature, of_y);
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kDepth; ++k) {
      const Quad a = load_quad(of_x + k * kPitch + own_row()), b = load_quad(of_y + k * kPitch + own_column());
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if constexpr (kDifferences) {
            const float difference = a.value[r] - b.value[c];
            z[r][c] = fmaf(difference, difference, z[r][c]);
          } else {
            z[r][c] = fmaf(a.value[r], b.value[c], z[r][c]);
          }
        }
      }
    }
    __syncthreads();
  }
}

// z of the tile at (row, column) of a problem; beyond a matrix it is infinite. shared: kTile kPitch.
template <PairCost kCost>
__device__ __forceinline__ void load_pairs(const Pairs<float>& pairs, int64_t problem, int64_t row, int64_t column,
                                           float* shared, float (&z)[4][4]) {
  const int64_t rows_left = pairs.rows - row, columns_left = pairs.columns - column;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) z[r][c] = 0.0f;
  }
  if constexpr (kCost == PairCost::kMatrix) {
    const float* matrix =
        pairs.matrix + problem * pairs.batch_stride + row * pairs.row_stride + column * pairs.column_stride;
    const bool by_rows = pairs.column_stride <= pairs.row_stride;  // neighbours in memory go to neighbouring threads
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int r = by_rows ? i / kTile : i % kTile, c = by_rows ? i % kTile : i / kTile;
      const bool inside = r < rows_left && c < columns_left;
      shared[r * kPitch + c] = inside ? matrix[r * pairs.row_stride + c * pairs.column_stride] : infinity<float>();
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const Quad quad = load_quad(shared + (own_row() + r) * kPitch + own_column());
#pragma unroll
      for (int c = 0; c < 4; ++c) z[r][c] = quad.value[c];
    }
    __syncthreads();
  } else {
    const int64_t features = pairs.features;
    const float* x = pairs.x + (problem * pairs.rows + row) * features;
    const float* y = pairs.y + (problem * pairs.columns + column) * features;
    constexpr bool kDistances = kCost == PairCost::kEuclidean;
    add_products<kDistances>(x, y, rows_left, columns_left, features, shared, z);
    if constexpr (kDistances) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) z[r][c] = sqrtf(z[r][c]);
      }
    }
  }
}

template <PairCost kCost>
__device__ __forceinline__ float factor_of(float inverse) {
  return kCost == PairCost::kSquaredEuclidean ? 2.0f * inverse : -inverse;
}

// Of one side: potentials, squares or null, marginal or null (ones).
struct Side {
  const float* potential;
  const float* squares;
  const float* marginal;

  __device__ __forceinline__ float hat(int64_t at, float inverse) const {
    const float s = squares != nullptr ? squares[at] : 0.0f;
    return (potential[at] - s) * inverse + (marginal != nullptr ? ::logf(marginal[at]) : 0.0f);
  }
};

// hat of up to 64 columns, -inf beyond.
__device__ __forceinline__ void stage_hats(const Side& side, int64_t first, int64_t left, float inverse, float* out) {
  if (threadIdx.x < kTile)
    out[threadIdx.x] = threadIdx.x < left ? side.hat(first + threadIdx.x, inverse) : -infinity<float>();
}

// Over the 16 threads of a row.
template <typename Function>
__device__ __forceinline__ void over_row_threads(Function f) {
#pragma unroll
  for (int lanes = 8; lanes > 0; lanes /= 2) f(lanes);
}

// The sum over the block, in a fixed order, for thread 0. shared: a number for every warp.
template <typename T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
  value = lane_sum(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = shared[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) total += shared[warp];
  __syncthreads();
  return total;
}

__device__ __forceinline__ float epsilon_now(const SinkhornDecision& decision, int64_t problem) {
  return fmaxf(decision.start[problem] * decision.decay, decision.epsilon[problem]);
}

__device__ __forceinline__ float total_error(const SinkhornDecision& decision, int64_t problem, float* shared) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < decision.tiles; i += blockDim.x)
    sum += decision.partials[problem * decision.tiles + i];
  sum = block_sum(sum, shared);
  return decision.mass[problem] > 0.0f ? sum / decision.mass[problem] : 0.0f;
}

// Whether iteration t counts, the same in every block of a problem; the first says so.
__device__ __forceinline__ bool goes_on(const SinkhornDecision& decision, int64_t problem, bool first, float* shared) {
  const float error = total_error(decision, problem, shared);
  const bool at_last = epsilon_now(decision, problem) == decision.epsilon[problem];
  const bool on = decision.t == 0 || !at_last || !(error <= decision.tol);
  if (first && threadIdx.x == 0) {
    decision.error[problem] = error;
    if (on) decision.n_iter[problem] = decision.t + 1;
  }
  return on;
}

template <PairCost kCost>
__global__ void __launch_bounds__(kThreads) half_step_kernel(const __grid_constant__ SinkhornHalfStep step) {
  float* shared = static_cast<float*>(dynamic_shared());
  float* hats = shared + kTile * kPitch;  // 2 x 64, in turn
  float* sums = hats + 2 * kTile;         // one for every warp
  const Pairs<float>& pairs = step.pairs;
  const int64_t tiles = row_tiles(pairs.rows);
  const int64_t problem = flat_block() / tiles, tile = flat_block() % tiles;
  if (problem >= pairs.batch || step.decision.n_iter[problem] < step.decision.t) return;
  if (step.own == nullptr && !goes_on(step.decision, problem, tile == 0, sums)) return;
  const float now = epsilon_now(step.decision, problem), inverse = 1.0f / now, factor = factor_of<kCost>(inverse);
  const int64_t row = tile * kTile;
  const Side side{step.from, step.y_squares, step.other};
  float top[4], total[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) top[r] = -infinity<float>(), total[r] = 0.0f;
  for (int64_t column = 0, turn = 0; column < pairs.columns; column += kTile, turn ^= 1) {
    float* own_hats = hats + turn * kTile;
    stage_hats(side, problem * pairs.columns + column, pairs.columns - column, inverse, own_hats);
    float z[4][4];
    load_pairs<kCost>(pairs, problem, row, column, shared, z);
    const Quad hat = load_quad(own_hats + own_column());
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float above = top[r];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        z[r][c] = fmaf(factor, z[r][c], hat.value[c]);
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
    over_row_threads([&](int lanes) {
      const float other_top = __shfl_xor_sync(0xffffffffu, top[r], lanes);
      const float other_total = __shfl_xor_sync(0xffffffffu, total[r], lanes);
      const float above = fmaxf(top[r], other_top), finite = above > -infinity<float>() ? above : 0.0f;
      total[r] = total[r] * fast_exp(top[r] - finite) + other_total * fast_exp(other_top - finite);
      top[r] = above;
    });
    const int64_t i = row + own_row() + r, at = problem * pairs.rows + i;
    if (threadIdx.x % 16 != 0 || i >= pairs.rows) continue;
    const bool dead = total[r] == 0.0f;
    float lse = dead ? -infinity<float>() : top[r] + ::logf(total[r]);
    if (step.x_squares != nullptr) lse -= step.x_squares[at] * inverse;
    float after = dead ? 0.0f : -now * damping(step.rho, now) * lse;
    if (step.own != nullptr) {
      const float before = step.before[at], a = step.own[at];
      const float ratio = target_ratio(before * inverse, now, step.rho);
      if (a > 0.0f) error += a * fabsf(::expf(before * inverse + lse) - ratio);
      if (step.symmetric) after = 0.5f * (before + after);
    }
    step.after[at] = after;
  }
  if (step.own == nullptr) return;
  error = block_sum(error, sums);
  if (threadIdx.x == 0) step.partials[problem * tiles + tile] = error;
}

// |x|^2, a warp for each point.
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const float* points, int64_t count, int64_t features, float* squares) {
  const int64_t point = flat_block() * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (point >= count) return;
  float sum = 0.0f;
  for (int64_t k = threadIdx.x % kWarp; k < features; k += kWarp) {
    const float x = points[point * features + k];
    sum = fmaf(x, x, sum);
  }
  sum = lane_sum(sum);
  if (threadIdx.x % kWarp == 0) squares[point] = sum;
}

__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ SinkhornCall<float> call, float* mass) {
  const int64_t problem = flat_block();
  if (problem >= call.pairs.batch) return;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < call.pairs.rows; i += kThreads) sum += call.a[problem * call.pairs.rows + i];
  sum = block_sum(sum, static_cast<double*>(dynamic_shared()));
  if (threadIdx.x != 0) return;
  mass[problem] = static_cast<float>(sum);
  call.n_iter[problem] = 0;
}

__global__ void __launch_bounds__(kThreads)
    decide_kernel(const __grid_constant__ SinkhornDecision decision, int64_t batch) {
  const int64_t problem = flat_block();
  if (problem >= batch || decision.n_iter[problem] < decision.t) return;
  goes_on(decision, problem, true, static_cast<float*>(dynamic_shared()));
}

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ SinkhornFinish finish) {
  const SinkhornCall<float>& call = finish.call;
  const int64_t problem = flat_block(), rows = call.pairs.rows, columns = call.pairs.columns;
  if (problem >= call.pairs.batch) return;
  double* shared = static_cast<double*>(dynamic_shared());
  const bool copies = finish.second != nullptr && call.n_iter[problem] % 2 != 0;
  double dual = 0.0, of_a = 0.0, of_b = 0.0, mass = 0.0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const int64_t at = problem * rows + i;
    const float f = copies ? finish.second[at] : call.f[at];
    if (copies) call.f[at] = f;
    if (call.symmetric) call.g[at] = f;
    dual += dual_term(call.a[at], f, call.rho_a);
    of_a += call.a[at];
  }
  __syncthreads();
  for (int64_t j = threadIdx.x; j < columns; j += kThreads) {
    const int64_t at = problem * columns + j;
    dual += dual_term(call.b[at], call.g[at], call.rho_b);
    of_b += call.b[at];
    mass += static_cast<double>(call.b[at]) * target_ratio(call.g[at], 1.0f, call.rho_b);
  }
  dual = block_sum(dual, shared);
  of_a = block_sum(of_a, shared);
  of_b = block_sum(of_b, shared);
  mass = block_sum(mass, shared);
  if (threadIdx.x == 0)
    call.value[problem] = static_cast<float>(dual - static_cast<double>(call.epsilon[problem]) * (mass - of_a * of_b));
  if (finish.second == nullptr || call.n_iter[problem] != call.max_iter) return;
  const float error = total_error(finish.decision, problem, static_cast<float*>(dynamic_shared()));
  if (threadIdx.x == 0) call.error[problem] = error;
}

// out = P w v over a strip of rows and kValues values. The weights of a tile go through shared memory, 64 columns by 64
// rows, for they are read along their columns.
template <PairCost kCost, int kValues>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const __grid_constant__ SinkhornApply<float> call, const float* x_squares, const float* y_squares) {
  constexpr int kPerThread = kValues / 16;
  float* shared = static_cast<float*>(dynamic_shared());
  float* weights = shared + kTile * kPitch;
  float* values = weights + kTile * kPitch;  // (64, kValues)
  float* hats = values + kTile * kValues;
  const Pairs<float>& pairs = call.pairs;
  const int64_t strips = row_tiles(pairs.rows), parts = (call.values + kValues - 1) / kValues;
  const int64_t problem = flat_block() / (strips * parts), rest = flat_block() % (strips * parts);
  if (problem >= pairs.batch) return;
  const int64_t row = rest / parts * kTile, first = rest % parts * kValues;
  const float inverse = 1.0f / call.epsilon[problem], factor = factor_of<kCost>(inverse);
  const Side of_rows{call.f, x_squares, call.a}, of_columns{call.g, y_squares, call.b};
  float row_hat[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t i = row + own_row() + r;
    row_hat[r] = i < pairs.rows ? of_rows.hat(problem * pairs.rows + i, inverse) : -infinity<float>();
  }
  float out[4][kPerThread] = {};
  const int value = static_cast<int>(threadIdx.x) % 16 * kPerThread;
  for (int64_t column = 0, turn = 0; column < pairs.columns; column += kTile, turn ^= 1) {
    float* own_hats = hats + turn * kTile;
    const int64_t columns_left = pairs.columns - column;
    stage_hats(of_columns, problem * pairs.columns + column, columns_left, inverse, own_hats);
    float z[4][4];
    load_pairs<kCost>(pairs, problem, row, column, shared, z);
    const Quad hat = load_quad(own_hats + own_column());
    float w[4][4] = {};
    if (call.h != nullptr) {
      add_products<false>(call.h + (problem * pairs.rows + row) * call.weights,
                          call.k + (problem * pairs.columns + column) * call.weights, pairs.rows - row, columns_left,
                          call.weights, shared, w);
    }
    const float* v = call.v + (problem * pairs.columns + column) * call.values;
    for (int i = threadIdx.x; i < kTile * kValues; i += kThreads) {
      const int j = i / kValues, k = i % kValues;
      values[i] = j < columns_left && first + k < call.values ? v[j * call.values + first + k] : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float p = fast_exp(fmaf(factor, z[r][c], row_hat[r] + hat.value[c]));
        if (call.h != nullptr) p *= w[r][c];
        if (call.over_distance) p = z[r][c] > 0.0f ? p / z[r][c] : 0.0f;
        weights[(own_column() + c) * kPitch + own_row() + r] = p;
      }
    }
    __syncthreads();
#pragma unroll 4
    for (int j = 0; j < kTile; ++j) {
      const Quad p = load_quad(weights + j * kPitch + own_row());
#pragma unroll
      for (int u = 0; u < kPerThread; ++u) {
        const float x = values[j * kValues + value + u];
#pragma unroll
        for (int r = 0; r < 4; ++r) out[r][u] = fmaf(p.value[r], x, out[r][u]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t i = row + own_row() + r;
#pragma unroll
    for (int u = 0; u < kPerThread; ++u) {
      const int64_t k = first + value + u;
      if (i < pairs.rows && k < call.values) call.out[(problem * pairs.rows + i) * call.values + k] = out[r][u];
    }
  }
}

// A tile of P.
__global__ void __launch_bounds__(kThreads) plan_kernel(const __grid_constant__ SinkhornApply<float> call) {
  float* shared = static_cast<float*>(dynamic_shared());
  const Pairs<float>& pairs = call.pairs;
  const int64_t strips = row_tiles(pairs.rows), parts = row_tiles(pairs.columns);
  const int64_t problem = flat_block() / (strips * parts), rest = flat_block() % (strips * parts);
  if (problem >= pairs.batch) return;
  const int64_t row = rest / parts * kTile, column = rest % parts * kTile;
  const float inverse = 1.0f / call.epsilon[problem];
  const Side of_rows{call.f, nullptr, call.a}, of_columns{call.g, nullptr, call.b};
  float z[4][4];
  load_pairs<PairCost::kMatrix>(pairs, problem, row, column, shared, z);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int64_t j = column + own_column() + c;
    if (j >= pairs.columns) continue;
    const float hat = of_columns.hat(problem * pairs.columns + j, inverse);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t i = row + own_row() + r, at = problem * pairs.rows + i;
      if (i >= pairs.rows) continue;
      call.out[at * pairs.columns + j] = ::expf(fmaf(-inverse, z[r][c], hat + of_rows.hat(at, inverse)));
    }
  }
}

template <typename Function>
const char* with_cost(PairCost cost, Function f) {
  switch (cost) {
    case PairCost::kMatrix:
      return f(std::integral_constant<PairCost, PairCost::kMatrix>{});
    case PairCost::kSquaredEuclidean:
      return f(std::integral_constant<PairCost, PairCost::kSquaredEuclidean>{});
    default:
      return f(std::integral_constant<PairCost, PairCost::kEuclidean>{});
  }
}

template <PairCost kCost, int kValues>
const char* launch_apply(const SinkhornApply<float>& call, const float* x_squares, const float* y_squares,
                         void* stream) {
  const int64_t parts = (call.values + kValues - 1) / kValues;
  const size_t floats = kTile * (2 * kPitch + kValues + 2);
  return launch(apply_kernel<kCost, kValues>, flat_grid(call.pairs.batch * row_tiles(call.pairs.rows) * parts),
                dim3(kThreads), floats * sizeof(float), stream, call, x_squares, y_squares);
}

}  // namespace

const char* sinkhorn_squares_cuda(const float* points, int64_t count, int64_t features, float* squares, void* stream) {
  constexpr int kPoints = kThreads / kWarp;
  return launch(squares_kernel, flat_grid((count + kPoints - 1) / kPoints), dim3(kThreads), 0, stream, points, count,
                features, squares);
}

const char* sinkhorn_prepare_cuda(const SinkhornCall<float>& call, float* mass, void* stream) {
  return launch(prepare_kernel, flat_grid(call.pairs.batch), dim3(kThreads), kThreads / kWarp * sizeof(double), stream,
                call, mass);
}

const char* sinkhorn_half_step_cuda(const SinkhornHalfStep& step, void* stream) {
  const int64_t blocks = step.pairs.batch * row_tiles(step.pairs.rows);
  const size_t floats = kTile * (kPitch + 2) + kThreads / kWarp;
  return with_cost(step.pairs.cost, [&](auto cost) {
    return launch(half_step_kernel<decltype(cost)::value>, flat_grid(blocks), dim3(kThreads), floats * sizeof(float),
                  stream, step);
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

const char* sinkhorn_apply_cuda(const SinkhornApply<float>& call, const float* x_squares, const float* y_squares,
                                void* stream) {
  return with_cost(call.pairs.cost, [&](auto cost) {
    constexpr PairCost kCost = decltype(cost)::value;
    if (call.values <= 16) return launch_apply<kCost, 16>(call, x_squares, y_squares, stream);
    return launch_apply<kCost, 64>(call, x_squares, y_squares, stream);
  });
}

const char* sinkhorn_plan_cuda(const SinkhornApply<float>& call, void* stream) {
  const int64_t blocks = call.pairs.batch * row_tiles(call.pairs.rows) * row_tiles(call.pairs.columns);
  return launch(plan_kernel, flat_grid(blocks), dim3(kThreads), kTile * kPitch * sizeof(float), stream, call);
}

}  // namespace tilewise
