// Half an iteration of points whose cost comes from inner products, on the tensor cores: a warp has 16 rows of a strip
// of 64 and all columns of a tile of 64. Products are those of floats, of three in tf32 (common/mma.cuh).
#include "common/mma.cuh"
#include "common/vector.cuh"
#include "sinkhorn/half_step.cuh"
#include "sinkhorn/pairs.cuh"

namespace tilewise {
namespace {

constexpr int kWarps = 4, kRowsOfWarp = 16, kColumnsOfProduct = 8, kProducts = kTile / kColumnsOfProduct;
static_assert(kWarps * kRowsOfWarp == kTile);
constexpr int kGroup = 8;                        // features of a product
constexpr int kGroups = 4, kKept = 2 * kGroups;  // at a time, and of rows that stay for the whole strip

// In shared memory a lane's operands of a product are a quad. Those of lane (g, k) are at 10 k + g: points that are
// written, and lanes that read, side by side meet in no bank.
constexpr int kOperands = 4 * 38;  // numbers of one product
__device__ __forceinline__ int operands_at(int g, int k) { return 4 * (10 * k + g); }

// Eight features of a point; 0 where there are none.
struct Features {
  float value[kGroup];

  __device__ __forceinline__ Features(const float* points, int point, int64_t left, int64_t features, int64_t feature,
                                      bool by_quads) {
    const int64_t rest = point < left ? features - feature : 0;
    const float* from = points + point * features + feature;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Quad quad = {};
      if (by_quads) {
        if (4 * half < rest) quad = load_quad(from + 4 * half);
      } else {
#pragma unroll
        for (int u = 0; u < 4; ++u) quad.value[u] = 4 * half + u < rest ? from[4 * half + u] : 0.0f;
      }
      memcpy(value + 4 * half, &quad, sizeof(quad));
    }
  }
};

// Rows g and g + 8 of a warp: (g, k), (g + 8, k), (g, k + 4), (g + 8, k + 4). By warps, then by groups.
__device__ __forceinline__ void stage_rows(const float* points, int64_t left, int64_t features, int64_t feature,
                                           bool by_quads, float* out) {
  const int pair = static_cast<int>(threadIdx.x) % (kTile / 2), group = static_cast<int>(threadIdx.x) / (kTile / 2);
  const int warp = pair / 8, g = pair % 8, row = warp * kRowsOfWarp + g;
  const Features near(points, row, left, features, feature + group * kGroup, by_quads);
  const Features far(points, row + 8, left, features, feature + group * kGroup, by_quads);
  float* quads = out + (warp * kKept + group) * kOperands;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    store_quad(quads + operands_at(g, k), {near.value[k], far.value[k], near.value[k + 4], far.value[k + 4]});
}

// Columns, split: (k, g), (k + 4, g), and what they leave. By products, then by groups.
__device__ __forceinline__ void stage_columns(const float* points, int64_t left, int64_t features, int64_t feature,
                                              bool by_quads, float* out) {
#pragma unroll
  for (int turn = 0; turn < kTile * kGroups / (kWarps * kWarp); ++turn) {
    const int item = static_cast<int>(threadIdx.x) + turn * kWarps * kWarp, point = item % kTile, group = item / kTile;
    const Features y(points, point, left, features, feature + group * kGroup, by_quads);
    float* quads = out + (point / kColumnsOfProduct * kGroups + group) * kOperands;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Split near(y.value[k]), far(y.value[k + 4]);
      store_quad(quads + operands_at(point % kColumnsOfProduct, k), {near.high, far.high, near.low, far.low});
    }
  }
}

// z += <x, y> of this warp's rows and the tile's columns.
__device__ __forceinline__ void add_products(const float* x, const float* y, int64_t features,
                                             float (&z)[kProducts][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, own = operands_at(lane / 4, lane % 4);
#pragma unroll 2
  for (int group = 0; group < kGroups && group * kGroup < features; ++group) {
    const Quad rows = load_quad(x + group * kOperands + own);
    Split a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = Split(rows.value[i]);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      const Quad b = load_quad(y + (n * kGroups + group) * kOperands + own);
      multiply_split(z[n], a, {b.value[0], b.value[1]}, {b.value[2], b.value[3]});
    }
  }
}

__global__ void __launch_bounds__(kWarps* kWarp, 4)
    product_half_step_kernel(const __grid_constant__ SinkhornHalfStep step) {
  float* x = static_cast<float*>(dynamic_shared());
  float* y = x + kWarps * kKept * kOperands;
  float* offsets = y + kProducts * kGroups * kOperands;  // 2 x 64, in turn
  float* sums = offsets + 2 * kTile;                     // one for every warp
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
  const bool stays = features <= kKept * kGroup;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int pair = lane % 4 * 2;  // its first column of every product
  float top[2] = {-infinity<float>(), -infinity<float>()}, total[2] = {};
  for (int64_t column = 0, turn = 0; column < pairs.columns; column += kTile, turn ^= 1) {
    float* own_offsets = offsets + turn * kTile;
    stage_offsets(side, problem * pairs.columns + column, pairs.columns - column, inverse, own_offsets);
    const float* of_y = pairs.y + (problem * pairs.columns + column) * features;
    float z[kProducts][4] = {};
    for (int64_t feature = 0; feature < features; feature += kGroups * kGroup) {
      const int group = stays ? static_cast<int>(feature) / kGroup : 0;
      if (column > 0 || feature > 0) __syncthreads();  // what was there is read
      if (column == 0 || !stays) stage_rows(of_x, pairs.rows - row, features, feature, by_quads, x + group * kOperands);
      stage_columns(of_y, pairs.columns - column, features, feature, by_quads, y);
      __syncthreads();
      add_products(x + (warp * kKept + group) * kOperands, y, features - feature, z);
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
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int lanes = 2; lanes > 0; lanes /= 2) merge_over_lanes(top[r], total[r], lanes);
    const int64_t i = row + warp * kRowsOfWarp + lane / 4 + 8 * r;
    if (lane % 4 == 0 && i < pairs.rows) error += finish_row(step, stage, problem, i, top[r], total[r]);
  }
  if (step.own == nullptr) return;
  error = Team(sums).all_sum(error);
  if (threadIdx.x == 0) step.partials[problem * tiles + tile] = error;
}

}  // namespace

const char* sinkhorn_product_half_step_cuda(const SinkhornHalfStep& step, void* stream) {
  const int64_t blocks = step.pairs.batch * row_tiles(step.pairs.rows);
  const size_t floats = (kWarps * kKept + kProducts * kGroups) * kOperands + 2 * kTile + kWarps;
  return launch(product_half_step_kernel, flat_grid(blocks), dim3(kWarps * kWarp), floats * sizeof(float), stream,
                step);
}

}  // namespace tilewise
