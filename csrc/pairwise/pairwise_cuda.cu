// The pairwise engine on CUDA: a warp or a block per row of similarities, which its threads walk side by side once per
// fold of the loss. Relations are compared again in every fold: the labels of a chunk stay in the cache.
#include "pairwise/programs.h"
#include "rows/rows.cuh"

namespace tilewise {
namespace {

constexpr int kMostValues = 4;  // of a fold

template <typename Storage>
class Row {
 public:
  __device__ Row(const PairwiseChunk<float>& chunk, int64_t row)
      : chunk_(chunk),
        row_(row),
        scale_(*chunk.scale),
        bias_(chunk.bias != nullptr ? *chunk.bias : 0.0f),
        s_(chunk.similarities + row * chunk.row_stride),
        label_(chunk.relations.x_labels[row]),
        self_(chunk.relations.excludes_self ? row + chunk.relations.self_offset : -1) {
    if (chunk.relations.guide == nullptr) return;
    const int64_t positive = first([](float, int relation) { return relation > 0; });
    if (positive < 0) return;
    guide_ = chunk.relations.guide + row * chunk.relations.guide_stride;
    most_ = guide_[positive] - chunk.relations.guide_margin;
  }

  template <typename... Ops, typename Function>
  __device__ __forceinline__ auto fold(const Function& f) {
    if constexpr (sizeof...(Ops) == 1) {
      return fold_as<Ops...>([&f](auto z, auto relation) { return values(f(z, relation)); }).value[0];
    } else {
      return fold_as<Ops...>(f);
    }
  }

  template <typename Function>
  __device__ __forceinline__ int64_t first(const Function& f) {
    constexpr int64_t kNone = INT64_MAX;
    int64_t found = kNone;
    for (int64_t j = threadIdx.x; j < chunk_.columns && found == kNone; j += blockDim.x) {
      if (f(z(j), relation(j))) found = j;
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const int64_t other = __shfl_xor_sync(0xffffffffu, found, offset);
      found = other < found ? other : found;
    }
    if (blockDim.x > kWarp) {
      int64_t* partial = static_cast<int64_t*>(next_buffer());
      if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = found;
      __syncthreads();
      for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) found = partial[warp] < found ? partial[warp] : found;
    }
    return found == kNone ? -1 : found;
  }

  __device__ void finish(float loss) { set(loss, 1.0f); }

  __device__ void skip() {
    set(0.0f, 0.0f);
    if (chunk_.wants_gradient) write_two(-1, 0.0f, -1, 0.0f);
  }

  __device__ bool wants_gradient() const { return chunk_.wants_gradient; }

  template <typename Function>
  __device__ __forceinline__ void write(const Function& f) {
    const float factor = upstream_of_row(chunk_.upstream, row_);
    Storage* out = gradient();
    Values<float, 1> sum{0.0f};
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < chunk_.columns; j += blockDim.x) {
      const float g = factor * f(z(j), relation(j));
      sum.value[0] += g;
      from_float(g, out[j]);
    }
    sum = over_row<Sum>(sum);
    if (threadIdx.x == 0) chunk_.bias_rows[row_] = sum.value[0];
  }

  __device__ void write_two(int64_t a, float at_a, int64_t b, float at_b) {
    const float factor = upstream_of_row(chunk_.upstream, row_);
    for (int64_t j = threadIdx.x; j < chunk_.columns; j += blockDim.x)
      from_float(factor * ((j == a ? at_a : 0.0f) + (j == b ? at_b : 0.0f)), gradient()[j]);
    if (threadIdx.x == 0) chunk_.bias_rows[row_] = factor * ((a >= 0 ? at_a : 0.0f) + (b >= 0 ? at_b : 0.0f));
  }

 private:
  template <typename... Ops, typename Function>
  __device__ __forceinline__ Values<float, sizeof...(Ops)> fold_as(const Function& f) {
    Values<float, sizeof...(Ops)> total{initial(Ops{})...};
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < chunk_.columns; j += blockDim.x) combine<Ops...>(total, f(z(j), relation(j)));
    return over_row<Ops...>(total);
  }

  static __device__ float initial(Sum) { return 0.0f; }
  static __device__ float initial(Max) { return -infinity<float>(); }
  static __device__ float initial(Min) { return infinity<float>(); }
  static __device__ float combined(Sum, float a, float b) { return a + b; }
  static __device__ float combined(Max, float a, float b) { return b > a ? b : a; }
  static __device__ float combined(Min, float a, float b) { return b < a ? b : a; }

  template <typename... Ops>
  static __device__ __forceinline__ void combine(Values<float, sizeof...(Ops)>& total,
                                                 const Values<float, sizeof...(Ops)>& values) {
    int i = 0;
    ((total.value[i] = combined(Ops{}, total.value[i], values.value[i]), ++i), ...);
  }

  // The total over the threads of the row, the same bits in each of them.
  template <typename... Ops>
  __device__ Values<float, sizeof...(Ops)> over_row(Values<float, sizeof...(Ops)> total) {
    constexpr int kCount = sizeof...(Ops);
    static_assert(kCount <= kMostValues);
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      Values<float, kCount> other;
#pragma unroll
      for (int i = 0; i < kCount; ++i) other.value[i] = __shfl_xor_sync(0xffffffffu, total.value[i], offset);
      combine<Ops...>(total, other);
    }
    if (blockDim.x == kWarp) return total;
    auto* partial = static_cast<Values<float, kCount>*>(next_buffer());
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = total;
    __syncthreads();
    total = partial[0];
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) combine<Ops...>(total, partial[warp]);
    return total;
  }

  // Two buffers in turn: who writes one again has passed the barrier after everybody read it.
  __device__ void* next_buffer() {
    turn_ ^= 1;
    return static_cast<char*>(dynamic_shared()) + turn_ * (blockDim.x / kWarp) * sizeof(Values<float, kMostValues>);
  }

  __device__ float z(int64_t j) const { return scale_ * s_[j] + bias_; }

  __device__ int relation(int64_t j) const {
    if (j == self_) return 0;
    if (chunk_.relations.y_labels[j] == label_) return 1;
    return guide_ != nullptr && guide_[j] > most_ ? 0 : -1;
  }

  __device__ Storage* gradient() const { return static_cast<Storage*>(chunk_.gradient) + row_ * chunk_.row_stride; }

  __device__ void set(float loss, float active) {
    if (threadIdx.x != 0) return;
    chunk_.loss_rows[row_] = loss;
    chunk_.active_rows[row_] = active;
  }

  const PairwiseChunk<float>& chunk_;
  int64_t row_;
  float scale_;
  float bias_;
  const float* s_;
  int64_t label_;
  int64_t self_;
  const float* guide_ = nullptr;
  float most_ = 0.0f;
  int turn_ = 0;
};

template <typename Storage, typename Program>
__global__ void __launch_bounds__(kMostThreads) pairwise_kernel(const __grid_constant__ PairwiseChunk<float> chunk) {
  const int64_t index = flat_block() * blockDim.y + threadIdx.y;
  if (index >= chunk.rows) return;  // all threads of the row alike
  Row<Storage> row(chunk, index);
  run_program(Program{}, row, chunk.parameters);
}

template <typename Storage, typename Program>
const char* launch_rows(const PairwiseChunk<float>& chunk, void* stream) {
  const dim3 block = row_block(chunk.columns);
  const size_t shared = 2 * block.x / kWarp * sizeof(Values<float, kMostValues>);
  return launch(pairwise_kernel<Storage, Program>, flat_grid((chunk.rows + block.y - 1) / block.y), block, shared,
                stream, chunk);
}

}  // namespace

const char* pairwise_cuda(const PairwiseChunk<float>& chunk, void* stream) {
  if (chunk.rows == 0) return nullptr;
  return with_storage(chunk.gradient_dtype, [&](auto storage) {
    const auto launch_program = [&](auto program) {
      return launch_rows<decltype(storage), decltype(program)>(chunk, stream);
    };
    return with_program(chunk.program, launch_program, PairPrograms{});
  });
}

const char* pairwise_reduction_cuda(const RowReduction<float>& reduction, void* stream) {
  return launch_row_reduction(reduction, stream);
}

}  // namespace tilewise
