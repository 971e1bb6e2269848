// wta_crs on CUDA: a warp or a block for each row of elements.
#include "common/team.cuh"
#include "common/vector.cuh"
#include "wta_crs/wta_crs.h"

namespace tilewise {
namespace {

constexpr int kInFlight = 4;  // vectors of a row that are loaded before the first is used

// Squares are summed in double: whatever the order, float32 comes out the same but once in about 10^8.
template <typename Storage>
__global__ void __launch_bounds__(256, 4) wta_crs_norms_kernel(const __grid_constant__ RowNorms call) {
  constexpr int kCount = kVector<Storage>;
  const int64_t i = flat_block() * blockDim.y + threadIdx.y;
  if (i >= call.x.batch * call.x.rows) return;
  const Team team(dynamic_shared());
  const Storage* x = row_of<Storage>(call.x, i / call.x.rows, i % call.x.rows);
  const int64_t columns = call.x.columns, stride = call.x.column_stride;
  const int64_t whole = stride == 1 && is_vector_aligned(x) ? columns / kCount * kCount : 0;
  const int64_t step = team.size() * kCount;
  double sum = 0.0;
  const auto add = [&](auto vectors, int64_t first) {
    constexpr int kVectors = decltype(vectors)::value;
    Run<Storage, kCount> runs[kVectors];
#pragma unroll
    for (int u = 0; u < kVectors; ++u) runs[u] = load_vectors<false, kCount>(x + first + u * step);
    double sums[kVectors] = {};
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      float value[kCount];
      widen(runs[u], value);
#pragma unroll
      for (int e = 0; e < kCount; ++e) sums[u] += static_cast<double>(value[e]) * value[e];
    }
#pragma unroll
    for (int u = 0; u < kVectors; ++u) sum += sums[u];
  };
  int64_t first = team.rank() * kCount;
  for (; first + (kInFlight - 1) * step < whole; first += kInFlight * step)
    add(std::integral_constant<int, kInFlight>{}, first);
  for (; first < whole; first += step) add(std::integral_constant<int, 1>{}, first);
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

}  // namespace

const char* wta_crs_norms_cuda(const RowNorms& call, void* stream) {
  constexpr int64_t kMany = 8192;  // rows, which keep all multiprocessors busy by warps, and none waits for another
  const int64_t rows = call.x.batch * call.x.rows;
  const dim3 block = team_block(rows >= kMany && call.x.columns <= kMany ? kWarp : call.x.columns);
  const dim3 grid = flat_grid(team_blocks(rows, block));
  const char* error = nullptr;
  with_elements(call.x.dtype, [&](auto zero) {
    error = launch(wta_crs_norms_kernel<decltype(zero)>, grid, block, kTeamBytes, stream, call);
  });
  return error;
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
