// wta_crs on CUDA: a warp or a block for each row of elements; a block for all the rows of a problem, which stay in the
// second-level cache.
#include "common/team.cuh"
#include "common/vector.cuh"
#include "wta_crs/wta_crs.h"

namespace tilewise {
namespace {

constexpr int kSampleThreads = 1024;

// Squares are summed in double: whatever the order, float32 comes out the same but once in about 10^8.
template <typename Storage>
__global__ void __launch_bounds__(256) wta_crs_norms_kernel(const __grid_constant__ RowNorms call) {
  constexpr int kCount = kVector<Storage>;
  const int64_t i = flat_block() * blockDim.y + threadIdx.y;
  if (i >= call.x.batch * call.x.rows) return;
  const Team team(dynamic_shared());
  const Storage* x = row_of<Storage>(call.x, i / call.x.rows, i % call.x.rows);
  const int64_t columns = call.x.columns, stride = call.x.column_stride;
  const int64_t whole = stride == 1 && is_vector_aligned(x) ? columns / kCount * kCount : 0;
  double sum = 0.0;
  for (int64_t j = team.rank() * kCount; j < whole; j += team.size() * kCount) {
    float value[kCount];
    widen(load_vectors<false, kCount>(x + j), value);
#pragma unroll
    for (int e = 0; e < kCount; ++e) sum += static_cast<double>(value[e]) * value[e];
  }
  for (int64_t j = whole + team.rank(); j < columns; j += team.size()) {
    const double value = to_float(x[j * stride]);
    sum += value * value;
  }
  sum = team.all_sum(sum);
  if (team.first()) call.out[i] = static_cast<float>(::sqrt(sum));
}

template <typename Storage>
__global__ void __launch_bounds__(256) wta_crs_gather_kernel(const __grid_constant__ RowGather call) {
  constexpr int kCount = kVector<Storage>;
  const int64_t i = flat_block() * blockDim.y + threadIdx.y;
  if (i >= call.x.batch * call.k) return;
  const int64_t columns = call.x.columns, stride = call.x.column_stride, index = call.indices[i];
  const bool inside = index >= 0 && index < call.x.rows;  // else NaN, and no access
  const Storage* x = row_of<Storage>(call.x, i / call.k, inside ? index : 0);
  Storage* out = static_cast<Storage*>(call.out) + i * columns;
  const float scale = !inside ? quiet_nan<float>() : call.scales == nullptr ? 1.0f : call.scales[i];
  const bool vectors = stride == 1 && is_vector_aligned(x) && is_vector_aligned(out);
  const int64_t whole = vectors ? columns / kCount * kCount : 0;
  for (int64_t j = threadIdx.x * kCount; j < whole; j += blockDim.x * kCount) {
    float value[kCount];
    widen(load_vectors<true, kCount>(x + j), value);
#pragma unroll
    for (int e = 0; e < kCount; ++e) value[e] *= scale;
    store_vectors(out + j, narrow<Storage>(value));
  }
  for (int64_t j = whole + threadIdx.x; j < columns; j += blockDim.x)
    from_float(to_float(x[j * stride]) * scale, out[j]);
}

// Fills in the weights and returns their sum; `usable` says whether all norms are.
__device__ int64_t weigh(const Team& team, const RowSample& call, bool& usable) {
  double largest = 0.0;
  int wrong = 0;
  for (int64_t i = team.rank(); i < call.rows; i += team.size()) {
    const double size = size_of(call, i);
    wrong |= is_size(size) ? 0 : 1;
    largest = size > largest ? size : largest;
  }
  largest = team.all(largest, [](double a, double b) { return a > b ? a : b; });
  usable = team.all(wrong, [](int a, int b) { return a | b; }) == 0;
  int64_t all = 0, total = 0;
  for (int64_t i = team.rank(); i < call.rows; i += team.size()) {
    const int64_t units = usable ? units_of(size_of(call, i), largest, call.bits) : 0;
    call.weights[i] = units;
    all += units;
  }
  all = team.all_sum(all);
  for (int64_t i = team.rank(); i < call.rows; i += team.size()) {
    const int64_t weight = weight_of(call.weights[i], all / call.rows, call.mix);
    call.weights[i] = weight;
    total += weight;
  }
  return team.all_sum(total);
}

__device__ Shares share_out(const Team& team, const RowSample& call, int64_t total) {
  Shares shares{call.method != SampleMethod::kCrs, 0, call.k, total};
  while (shares.certain) {
    int64_t kept = 0, heavy = 0;
    for (int64_t i = team.rank(); i < call.rows; i += team.size()) {
      const int64_t weight = call.weights[i];
      if (!keeps(shares, weight)) continue;
      ++kept;
      heavy += weight;
    }
    kept = team.all_sum(kept);
    heavy = team.all_sum(heavy);
    if (kept == shares.kept) break;
    shares = {true, kept, call.k - kept, total - heavy};
  }
  return shares;
}

__global__ void __launch_bounds__(kSampleThreads, 1) wta_crs_sample_kernel(const __grid_constant__ RowSample problems) {
  const Team team(dynamic_shared());
  const int64_t problem = flat_block();
  const RowSample call = problem_of(problems, problem);
  bool usable;
  const int64_t sum = weigh(team, call, usable);
  const Shares shares = share_out(team, call, sum);
  const bool apart = call.method == SampleMethod::kSystematic;
  const int64_t stream = problem * call.k;
  const int64_t start = random_below(shares.rest, *call.seed, stream);
  // A thread has a run of rows: first what is before it, then each of them.
  const int64_t first = call.rows * team.rank() / team.size(), last = call.rows * (team.rank() + 1) / team.size();
  Before before{0, 0, 0};
  for (int64_t row = first; row < last; ++row) {
    const int64_t weight = call.weights[row];
    const bool keep = keeps(shares, weight);
    before.kept += keep ? 1 : 0;
    before.weight += keep ? 0 : weight;
  }
  int64_t total;
  before.kept = team.sum_before(before.kept, total);
  before.weight = team.sum_before(before.weight, total);
  if (apart) before.points = points_before(shares, start, before.weight);
  put_rows(call, shares, start, before, first, last, usable);
  if (apart) return;
  __syncthreads();
  for (int64_t i = team.rank(); i < shares.left; i += team.size()) put_draw(call, shares, stream, i, usable);
}

}  // namespace

const char* wta_crs_norms_cuda(const RowNorms& call, void* stream) {
  const dim3 block = team_block(call.x.columns);
  const dim3 grid = flat_grid(team_blocks(call.x.batch * call.x.rows, block));
  const char* error = nullptr;
  with_elements(call.x.dtype, [&](auto zero) {
    error = launch(wta_crs_norms_kernel<decltype(zero)>, grid, block, kTeamBytes, stream, call);
  });
  return error;
}

const char* wta_crs_sample_cuda(const RowSample& call, void* stream) {
  const dim3 block(call.rows <= 2048 ? 256 : kSampleThreads);
  return launch(wta_crs_sample_kernel, flat_grid(call.batch), block, kTeamBytes, stream, call);
}

const char* wta_crs_gather_cuda(const RowGather& call, void* stream) {
  const dim3 block = team_block(call.x.columns);
  const dim3 grid = flat_grid(team_blocks(call.x.batch * call.k, block));
  const char* error = nullptr;
  with_elements(call.x.dtype, [&](auto zero) {
    error = launch(wta_crs_gather_kernel<decltype(zero)>, grid, block, 0, stream, call);
  });
  return error;
}

}  // namespace tilewise
