// simplex_topk on CUDA: a warp for each row, which it holds in registers, or a block where rows are long.
#include "simplex_topk/long_rows.cuh"

namespace tilewise {
namespace {

__device__ __forceinline__ Target target_of(const SimplexTopk<float>& call) {
  return {static_cast<Count>(call.k), call.scale, false, 0.0f};
}

// What every entry of p gets beside its mass: NaN where there is no p.
__device__ __forceinline__ float beside(const Cut& cut) { return cut.top == cut.top ? 0.0f : quiet_nan<float>(); }

template <int kCount>
__global__ void __launch_bounds__(256) simplex_topk_kernel(const __grid_constant__ SimplexTopk<float> call) {
  const int64_t row = flat_block() * blockDim.y + threadIdx.y;
  if (row >= call.rows) return;
  const Row scores{call.x + row * call.columns};
  const InRegisters<kCount> held(scores, call.columns);
  const Cut cut = find_cut(Warp(), held, target_of(call), scores, call.columns);
  float* out = call.out + row * call.columns;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const int64_t i = held.index(j);
    if (i < call.columns) out[i] = cut.mass(held.own[j], i) + beside(cut);
  }
}

__global__ void __launch_bounds__(kLongThreads)
    simplex_topk_long_kernel(const __grid_constant__ SimplexTopk<float> call) {
  const int64_t row = flat_block();
  if (row >= call.rows) return;
  const Team team(dynamic_shared());
  const Row scores{call.x + row * call.columns};
  const Target target = target_of(call);
  float* room = room_of(dynamic_shared());
  float* out = call.out + row * call.columns;
  const Count count = take_in(team, scores, call.columns, target, room);
  with_cut(team, scores, call.columns, target, room, count, [&](const auto&, const Cut& cut) {
    each_loaded<kLongThreads>(threadIdx.x, call.columns, scores,
                              [&](int64_t i, float s) { out[i] = cut.mass(s, i) + beside(cut); });
  });
}

// Of a lane whose numbers are kWarp apart.
template <int kCount>
__global__ void __launch_bounds__(256) simplex_topk_backward_kernel(const __grid_constant__ SimplexTopk<float> call) {
  const int64_t row = flat_block() * blockDim.y + threadIdx.y;
  if (row >= call.rows) return;
  const InRegisters<kCount> p(Row{call.x + row * call.columns}, call.columns);
  const InRegisters<kCount> grad(Row{call.grad + row * call.columns}, call.columns);
  float sum = 0.0f, count = 0.0f;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (!(p.own[j] > 0.0f)) continue;
    sum += grad.own[j];
    count += 1.0f;
  }
  const float mean = Warp().all_sum(sum) / Warp().all_sum(count);
  float* out = call.out + row * call.columns;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const int64_t i = p.index(j);
    if (i < call.columns) out[i] = p.own[j] > 0.0f ? grad.own[j] - mean : 0.0f;
  }
}

__global__ void __launch_bounds__(kLongThreads)
    simplex_topk_long_backward_kernel(const __grid_constant__ SimplexTopk<float> call) {
  const int64_t row = flat_block();
  if (row >= call.rows) return;
  const Team team(dynamic_shared());
  const float* p = call.x + row * call.columns;
  const float* grad = call.grad + row * call.columns;
  float sum = 0.0f, count = 0.0f;
#pragma unroll 4
  for (int64_t i = team.rank(); i < call.columns; i += team.size()) {
    sum += p[i] > 0.0f ? grad[i] : 0.0f;
    count += p[i] > 0.0f ? 1.0f : 0.0f;
  }
  const float mean = team.all_sum(sum) / team.all_sum(count);
  float* out = call.out + row * call.columns;
#pragma unroll 4
  for (int64_t i = team.rank(); i < call.columns; i += team.size()) out[i] = p[i] > 0.0f ? grad[i] - mean : 0.0f;
}

const char* launch_warps(void (*kernel)(SimplexTopk<float>), const SimplexTopk<float>& call, void* stream) {
  const dim3 block(kWarp, 8);
  return launch(kernel, flat_grid(team_blocks(call.rows, block)), block, 0, stream, call);
}

}  // namespace

const char* simplex_topk_cuda(const SimplexTopk<float>& call, void* stream) {
  if (call.columns > kMostInRegisters)
    return launch(simplex_topk_long_kernel, flat_grid(call.rows), dim3(kLongThreads), long_bytes(call.columns), stream,
                  call);
  return with_registers(call.columns,
                        [&](auto count) { return launch_warps(simplex_topk_kernel<count>, call, stream); });
}

const char* simplex_topk_backward_cuda(const SimplexTopk<float>& call, void* stream) {
  if (call.columns > kMostInRegisters)
    return launch(simplex_topk_long_backward_kernel, flat_grid(call.rows), dim3(kLongThreads), kTeamBytes, stream,
                  call);
  return with_registers(call.columns,
                        [&](auto count) { return launch_warps(simplex_topk_backward_kernel<count>, call, stream); });
}

}  // namespace tilewise
