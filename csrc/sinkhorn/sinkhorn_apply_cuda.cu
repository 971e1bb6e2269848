// Products of plans, and plans, on CUDA: a block has a strip of rows, or of a plan one tile.
#include "sinkhorn/pairs.cuh"

namespace tilewise {
namespace {

// out = P w v over a strip of rows and kValues values. The weights of a tile go through shared memory, 64 columns by 64
// rows, for they are read along their columns.
template <typename Cost, int kValues>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const __grid_constant__ SinkhornApply<float> call, const float* x_squares, const float* y_squares) {
  constexpr int kPerThread = kValues / 16;
  float* shared = static_cast<float*>(dynamic_shared());
  float* weights = shared + kTile * kPitch;
  float* values = weights + kTile * kPitch;  // (64, kValues)
  float* offsets = values + kTile * kValues;
  const Pairs<float>& pairs = call.pairs;
  const int64_t strips = row_tiles(pairs.rows), parts = (call.values + kValues - 1) / kValues;
  const int64_t problem = flat_block() / (strips * parts), rest = flat_block() % (strips * parts);
  if (problem >= pairs.batch) return;
  const int64_t row = rest / parts * kTile, first = rest % parts * kValues;
  const float inverse = 1.0f / call.epsilon[problem], factor = factor_of<Cost>(inverse);
  const Side of_rows{call.f, x_squares, call.a}, of_columns{call.g, y_squares, call.b};
  float row_offset[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t i = row + own_row() + r;
    row_offset[r] = i < pairs.rows ? of_rows.offset(problem * pairs.rows + i, inverse) : -infinity<float>();
  }
  float out[4][kPerThread] = {};
  const int value = static_cast<int>(threadIdx.x) % 16 * kPerThread;
  for (int64_t column = 0, turn = 0; column < pairs.columns; column += kTile, turn ^= 1) {
    float* own_offsets = offsets + turn * kTile;
    const int64_t columns_left = pairs.columns - column;
    stage_offsets(of_columns, problem * pairs.columns + column, columns_left, inverse, own_offsets);
    float z[4][4];
    load_pairs<Cost>(pairs, problem, row, column, shared, z);
    const Quad offset = load_quad(own_offsets + own_column());
    float w[4][4] = {};
    if (call.h != nullptr) {
      add_features<InnerProduct>(call.h + (problem * pairs.rows + row) * call.weights,
                                 call.k + (problem * pairs.columns + column) * call.weights, pairs.rows - row,
                                 columns_left, call.weights, shared, w);
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
        float p = fast_exp(fmaf(factor, z[r][c], row_offset[r] + offset.value[c]));
        if (call.h != nullptr) p *= w[r][c];
        if (call.over_distance) p = Cost::slope(p, z[r][c]);
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
  load_pairs<MatrixCost>(pairs, problem, row, column, shared, z);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int64_t j = column + own_column() + c;
    if (j >= pairs.columns) continue;
    const float offset = of_columns.offset(problem * pairs.columns + j, inverse);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t i = row + own_row() + r, at = problem * pairs.rows + i;
      if (i >= pairs.rows) continue;
      call.out[at * pairs.columns + j] = ::expf(fmaf(-inverse, z[r][c], offset + of_rows.offset(at, inverse)));
    }
  }
}

template <typename Cost, int kValues>
const char* launch_apply(const SinkhornApply<float>& call, const float* x_squares, const float* y_squares,
                         void* stream) {
  const int64_t parts = (call.values + kValues - 1) / kValues;
  const size_t floats = kTile * (2 * kPitch + kValues + 2);
  return launch(apply_kernel<Cost, kValues>, flat_grid(call.pairs.batch * row_tiles(call.pairs.rows) * parts),
                dim3(kThreads), floats * sizeof(float), stream, call, x_squares, y_squares);
}

}  // namespace

const char* sinkhorn_apply_cuda(const SinkhornApply<float>& call, const float* x_squares, const float* y_squares,
                                void* stream) {
  return with_cost(call.pairs.cost, [&](auto cost) {
    using Cost = decltype(cost);
    if (call.values <= 16) return launch_apply<Cost, 16>(call, x_squares, y_squares, stream);
    // Every part takes the pairs anew. The gradient of 64 features has 65 or 66 values: in one part, then.
    if (call.values > 64 && (call.values + 79) / 80 < (call.values + 63) / 64)
      return launch_apply<Cost, 80>(call, x_squares, y_squares, stream);
    return launch_apply<Cost, 64>(call, x_squares, y_squares, stream);
  });
}

const char* sinkhorn_plan_cuda(const SinkhornApply<float>& call, void* stream) {
  const int64_t blocks = call.pairs.batch * row_tiles(call.pairs.rows) * row_tiles(call.pairs.columns);
  return launch(plan_kernel, flat_grid(blocks), dim3(kThreads), kTile * kPitch * sizeof(float), stream, call);
}

}  // namespace tilewise
