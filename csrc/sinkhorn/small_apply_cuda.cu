// Plans of small problems and their products, on CUDA: a thread for each pair, and then for each number of the product.
// A block has as many problems as have a pair for each of its threads, or one.
#include "sinkhorn/pairs.cuh"
#include "sinkhorn/small_problem.cuh"

namespace tilewise {
namespace {

TILEWISE_FN int64_t problems_of_block(const Pairs<float>& pairs) {
  const int64_t problems = kThreads / (pairs.rows * pairs.columns);
  return problems > 1 ? problems : 1;
}

// What a block has. Lines are the rows of its problems.
struct Share {
  __device__ __forceinline__ explicit Share(const Pairs<float>& pairs)
      : rows(static_cast<unsigned>(pairs.rows)), columns(static_cast<unsigned>(pairs.columns)) {
    const int64_t problems = problems_of_block(pairs);
    first = flat_block() * problems;
    const int64_t left = first < pairs.batch ? pairs.batch - first : 0;
    lines = static_cast<unsigned>(left < problems ? left : problems) * rows;
  }

  // f(line, column, problem, row) of this thread's pairs.
  template <typename Function>
  __device__ __forceinline__ void each_pair(Function f) const {
    for (unsigned pair = threadIdx.x; pair < lines * columns; pair += kThreads) {
      const unsigned line = pair / columns;
      f(line, pair % columns, first + line / rows, line % rows);
    }
  }

  unsigned rows, columns, lines;
  int64_t first;
};

// The logarithm of P.
__device__ __forceinline__ float score(const SinkhornApply<float>& call, int64_t problem, unsigned row, unsigned column,
                                       float z) {
  const float inverse = 1.0f / call.epsilon[problem];
  const Side of_rows{call.f, nullptr, call.a}, of_columns{call.g, nullptr, call.b};
  return fmaf(-inverse, z,
              of_columns.offset(problem * call.pairs.columns + column, inverse) +
                  of_rows.offset(problem * call.pairs.rows + row, inverse));
}

__global__ void __launch_bounds__(kThreads) small_plan_kernel(const __grid_constant__ SinkhornApply<float> call) {
  const Share share(call.pairs);
  float* out = call.out + share.first * call.pairs.rows * call.pairs.columns;
  share.each_pair([&](unsigned line, unsigned column, int64_t problem, unsigned row) {
    const float z = cost_of<MatrixCost>(call.pairs, problem, row, column);
    out[line * share.columns + column] = ::expf(score(call, problem, row, column, z));
  });
}

template <typename Cost>
__device__ __forceinline__ float weight(const SinkhornApply<float>& call, int64_t problem, unsigned row,
                                        unsigned column) {
  const float z = cost_of<Cost>(call.pairs, problem, row, column);
  float p = fast_exp(score(call, problem, row, column, z));
  if (call.h != nullptr) {
    const float* h = call.h + (problem * call.pairs.rows + row) * call.weights;
    const float* k = call.k + (problem * call.pairs.columns + column) * call.weights;
    float w = 0.0f;
    for (int64_t i = 0; i < call.weights; ++i) w = fmaf(h[i], k[i], w);
    p *= w;
  }
  return call.over_distance ? Cost::slope(p, z) : p;
}

// An odd pitch: threads read columns of weights.
TILEWISE_FN int64_t pitch_of(const Pairs<float>& pairs) { return pairs.columns | 1; }

template <typename Cost>
__global__ void __launch_bounds__(kThreads) small_apply_kernel(const __grid_constant__ SinkhornApply<float> call) {
  float* weights = static_cast<float*>(dynamic_shared());  // (lines, columns)
  const Share share(call.pairs);
  const unsigned pitch = static_cast<unsigned>(pitch_of(call.pairs)), values = static_cast<unsigned>(call.values);
  share.each_pair([&](unsigned line, unsigned column, int64_t problem, unsigned row) {
    weights[line * pitch + column] = weight<Cost>(call, problem, row, column);
  });
  __syncthreads();
  float* out = call.out + share.first * call.pairs.rows * call.values;
  for (unsigned i = threadIdx.x; i < share.lines * values; i += kThreads) {
    const unsigned line = i / values;
    const float* v = call.v + (share.first + line / share.rows) * share.columns * values + i % values;
    float sum = 0.0f;
    for (unsigned j = 0; j < share.columns; ++j) sum = fmaf(weights[line * pitch + j], v[j * values], sum);
    out[i] = sum;
  }
}

dim3 blocks_of(const Pairs<float>& pairs) {
  const int64_t problems = problems_of_block(pairs);
  return flat_grid((pairs.batch + problems - 1) / problems);
}

}  // namespace

const char* sinkhorn_small_plan_cuda(const SinkhornApply<float>& call, void* stream) {
  return launch(small_plan_kernel, blocks_of(call.pairs), dim3(kThreads), 0, stream, call);
}

const char* sinkhorn_small_apply_cuda(const SinkhornApply<float>& call, void* stream) {
  const size_t floats = static_cast<size_t>(problems_of_block(call.pairs) * call.pairs.rows * pitch_of(call.pairs));
  return with_cost(call.pairs.cost, [&](auto cost) {
    return launch(small_apply_kernel<decltype(cost)>, blocks_of(call.pairs), dim3(kThreads), floats * sizeof(float),
                  stream, call);
  });
}

}  // namespace tilewise
