// simplex_topk on CUDA: a warp for each row, or a block where rows are long.
#include "simplex_topk/project.cuh"

namespace tilewise {
namespace {

__global__ void __launch_bounds__(256) simplex_topk_kernel(const __grid_constant__ SimplexTopk<float> call) {
  const int64_t row = flat_block() * blockDim.y + threadIdx.y;
  if (row >= call.rows) return;
  const Team team(dynamic_shared());
  const Scores scores{call.x + row * call.columns, nullptr};
  const Cut cut = find_cut(team, scores, call.columns, call.k, call.scale, false, 0.0f);
  float* out = call.out + row * call.columns;
  const bool numbers = cut.top == cut.top;
  for (int64_t i = team.rank(); i < call.columns; i += team.size())
    out[i] = numbers ? cut.mass(scores(i), i) : quiet_nan<float>();
}

__global__ void __launch_bounds__(256) simplex_topk_backward_kernel(const __grid_constant__ SimplexTopk<float> call) {
  const int64_t row = flat_block() * blockDim.y + threadIdx.y;
  if (row >= call.rows) return;
  const Team team(dynamic_shared());
  const float* p = call.x + row * call.columns;
  const float* grad = call.grad + row * call.columns;
  float sum = 0.0f, count = 0.0f;
  for (int64_t i = team.rank(); i < call.columns; i += team.size()) {
    if (!(p[i] > 0.0f)) continue;
    sum += grad[i];
    count += 1.0f;
  }
  const float mean = team.all_sum(sum) / team.all_sum(count);
  float* out = call.out + row * call.columns;
  for (int64_t i = team.rank(); i < call.columns; i += team.size()) out[i] = p[i] > 0.0f ? grad[i] - mean : 0.0f;
}

const char* launch_rows(void (*kernel)(SimplexTopk<float>), const SimplexTopk<float>& call, void* stream) {
  const dim3 block = team_block(call.columns);
  return launch(kernel, flat_grid(team_blocks(call.rows, block)), block, kTeamBytes, stream, call);
}

}  // namespace

const char* simplex_topk_cuda(const SimplexTopk<float>& call, void* stream) {
  return launch_rows(simplex_topk_kernel, call, stream);
}

const char* simplex_topk_backward_cuda(const SimplexTopk<float>& call, void* stream) {
  return launch_rows(simplex_topk_backward_kernel, call, stream);
}

}  // namespace tilewise
