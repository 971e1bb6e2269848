// Half an iteration of points whose cost comes from inner products, on the tensor cores: a warp has 16 rows of a strip
// of 64 and all columns of a tile of 64. Products are those of floats, of three in tf32 (common/mma.cuh).
#include "common/mma.cuh"
#include "common/vector.cuh"
#include "sinkhorn/half_step.cuh"
#include "sinkhorn/pairs.cuh"

namespace tilewise {
namespace {

constexpr int kWarps = 4, kRowsOfWarp = kTile / kWarps, kColumnsOfProduct = 8, kProducts = kTile / kColumnsOfProduct;
constexpr int kFeatures = 64;               // at a time
constexpr int kPointPitch = kFeatures + 4;  // the 8 x 4 numbers that a warp reads together are in 32 banks

// `kFeatures` features of up to 64 points, point by point; 0 where there are none.
__device__ __forceinline__ void stage_rows(const float* points, int64_t left, int64_t features, int64_t feature,
                                           bool by_quads, float* out) {
  for (int i = threadIdx.x; i < kTile * kFeatures / 4; i += kWarps * kWarp) {
    const int point = i / (kFeatures / 4), k = i % (kFeatures / 4) * 4;
    const float* from = points + point * features + feature + k;
    const int64_t rest = point < left ? features - feature - k : 0;
    Quad quad = {};
    if (by_quads && rest >= 4) {
      quad = load_quad(from);
    } else {
#pragma unroll
      for (int u = 0; u < 4; ++u) quad.value[u] = u < rest ? from[u] : 0.0f;
    }
    store_quad(out + point * kPointPitch + k, quad);
  }
}

// z += <x, y> of this warp's 16 rows of x and the tile's columns.
__device__ __forceinline__ void add_products(const float* x, const float* y, int64_t features,
                                             float (&z)[kProducts][4]) {
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4, k = static_cast<int>(threadIdx.x) % 4;
  const float* own = x + (static_cast<int>(threadIdx.x) / kWarp * kRowsOfWarp + g) * kPointPitch + k;
  const float* others = y + g * kPointPitch + k;
  for (int feature = 0; feature < features && feature < kFeatures; feature += 8) {
    Split<4> a;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.set(i, own[i % 2 * 8 * kPointPitch + feature + i / 2 * 4]);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      Split<2> b;
#pragma unroll
      for (int i = 0; i < 2; ++i) b.set(i, others[n * kColumnsOfProduct * kPointPitch + feature + i * 4]);
      multiply_split(z[n], a, b);
    }
  }
}

__global__ void __launch_bounds__(kWarps* kWarp, 4)
    product_half_step_kernel(const __grid_constant__ SinkhornHalfStep step) {
  float* x = static_cast<float*>(dynamic_shared());
  float* y = x + kTile * kPointPitch;
  float* offsets = y + kTile * kPointPitch;  // 2 x 64, in turn
  float* sums = offsets + 2 * kTile;         // one for every warp
  const Pairs<float>& pairs = step.pairs;
  const int64_t tiles = row_tiles(pairs.rows), features = pairs.features;
  const int64_t problem = flat_block() / tiles, tile = flat_block() % tiles;
  if (problem >= pairs.batch) return;
  // t, or already t + 1 where the first block of the problem has decided: that it goes on, either way.
  if (read_relaxed(step.decision.n_iter + problem) < step.decision.t) return;
  if (step.own == nullptr && !goes_on(step.decision, problem, tile == 0, sums)) return;
  const Stage<float> stage = stage_of(step.decision, problem);
  const float inverse = 1.0f / stage.epsilon, factor = factor_of<SquaredEuclidean>(inverse);
  const int64_t row = tile * kTile;
  const float* of_x = pairs.x + (problem * pairs.rows + row) * features;
  const Side side{stage.averages() ? step.averaged_from : step.from, step.y_squares, step.other};
  const bool by_quads = features % 4 == 0 && is_vector_aligned(pairs.x) && is_vector_aligned(pairs.y);
  const int pair = static_cast<int>(threadIdx.x) % 4 * 2;  // its first column of every product
  float top[2] = {-infinity<float>(), -infinity<float>()}, total[2] = {};
  for (int64_t column = 0, turn = 0; column < pairs.columns; column += kTile, turn ^= 1) {
    float* own_offsets = offsets + turn * kTile;
    stage_offsets(side, problem * pairs.columns + column, pairs.columns - column, inverse, own_offsets);
    const float* of_y = pairs.y + (problem * pairs.columns + column) * features;
    float z[kProducts][4] = {};
    for (int64_t feature = 0; feature < features; feature += kFeatures) {
      if (column > 0 || feature > 0) __syncthreads();  // the tiles before are read
      if (column == 0 || features > kFeatures) stage_rows(of_x, pairs.rows - row, features, feature, by_quads, x);
      stage_rows(of_y, pairs.columns - column, features, feature, by_quads, y);
      __syncthreads();
      add_products(x, y, features - feature, z);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float above = top[r];
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = z[n][2 * r + c];
          score = fmaf(factor, score, own_offsets[n * kColumnsOfProduct + pair + c]);
          above = fmaxf(above, score);
        }
      }
      const float finite = above > -infinity<float>() ? above : 0.0f;
      float sum = total[r] * fast_exp(top[r] - finite);
#pragma unroll
      for (int n = 0; n < kProducts; ++n) sum += fast_exp(z[n][2 * r] - finite) + fast_exp(z[n][2 * r + 1] - finite);
      top[r] = above;
      total[r] = sum;
    }
  }
  float error = 0.0f;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int lanes = 2; lanes > 0; lanes /= 2) merge_over_lanes(top[r], total[r], lanes);
    const int64_t i = row + static_cast<int>(threadIdx.x) / kWarp * kRowsOfWarp + lane / 4 + 8 * r;
    if (lane % 4 == 0 && i < pairs.rows) error += finish_row(step, stage, problem, i, top[r], total[r]);
  }
  if (step.own == nullptr) return;
  error = Team(sums).all_sum(error);
  if (threadIdx.x == 0) step.partials[problem * tiles + tile] = error;
}

}  // namespace

const char* sinkhorn_product_half_step_cuda(const SinkhornHalfStep& step, void* stream) {
  const int64_t blocks = step.pairs.batch * row_tiles(step.pairs.rows);
  const size_t floats = 2 * kTile * kPointPitch + 2 * kTile + kWarps;
  return launch(product_half_step_kernel, flat_grid(blocks), dim3(kWarps * kWarp), floats * sizeof(float), stream,
                step);
}

}  // namespace tilewise
