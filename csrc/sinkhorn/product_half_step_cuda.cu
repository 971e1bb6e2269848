// Half an iteration of points whose cost comes from inner products, on the tensor cores: a warp has 16 rows of a strip
// of 64 and all columns of a tile of 64. Products are those of floats, of three in tf32 (common/mma.cuh), or with
// allow_tf32 one.
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
template <bool kOne>
constexpr int kQuads = kOne ? kGroups / 2 : kGroups;  // of a lane's operands, for the columns of these groups

// In shared memory a lane's operands of a product are a quad. Those of lane (g, k) are at 10 k + g: points that are
// written, and lanes that read, side by side meet in no bank.
constexpr int kOperands = 4 * 38;  // numbers of one product
__device__ __forceinline__ int operands_at(int g, int k) { return 4 * (10 * k + g); }

// Points as they lie in memory. kWhole: in quads, and in as many as a turn takes.
template <bool kWhole>
struct Points {
  const float* data;
  int64_t left;  // points
  int features;

  // Eight features of a point; 0 where there are none.
  __device__ __forceinline__ void load(int point, int feature, float (&value)[kGroup]) const {
    const float* from = data + static_cast<int64_t>(point) * features + feature;
    if constexpr (kWhole) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Quad quad = point < left ? load_quad(from + 4 * half) : Quad{};
        memcpy(value + 4 * half, &quad, sizeof(quad));
      }
    } else {
      const int rest = point < left ? features - feature : 0;
#pragma unroll
      for (int u = 0; u < kGroup; ++u) value[u] = u < rest ? from[u] : 0.0f;
    }
  }
};

// Rows g and g + 8 of a warp: (g, k), (g + 8, k), (g, k + 4), (g + 8, k + 4). By warps, then by groups.
template <bool kWhole>
__device__ __forceinline__ void stage_rows(const Points<kWhole>& points, int feature, float* out) {
  const int pair = static_cast<int>(threadIdx.x) % (kTile / 2), group = static_cast<int>(threadIdx.x) / (kTile / 2);
  const int warp = pair / 8, g = pair % 8, row = warp * kRowsOfWarp + g;
  float near[kGroup], far[kGroup];
  points.load(row, feature + group * kGroup, near);
  points.load(row + 8, feature + group * kGroup, far);
  float* quads = out + (warp * kKept + group) * kOperands;
#pragma unroll
  for (int k = 0; k < 4; ++k) store_quad(quads + operands_at(g, k), {near[k], far[k], near[k + 4], far[k + 4]});
}

// Columns: (k, g), (k + 4, g), and beside them what these leave, or with kOne those of the next group. By products,
// then by groups or pairs of groups.
template <bool kOne, bool kWhole>
__device__ __forceinline__ void stage_columns(const Points<kWhole>& points, int feature, float* out) {
#pragma unroll
  for (int turn = 0; turn < kTile * kQuads<kOne> / (kWarps * kWarp); ++turn) {
    const int item = static_cast<int>(threadIdx.x) + turn * kWarps * kWarp, point = item % kTile, quad = item / kTile;
    const int first = feature + quad * (kGroups / kQuads<kOne> * kGroup);
    float y[kGroup], next[kGroup];
    points.load(point, first, y);
    if constexpr (kOne) points.load(point, first + kGroup, next);
    float* quads = out + (point / kColumnsOfProduct * kQuads<kOne> + quad) * kOperands;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Split near(y[k]), far(y[k + 4]);
      Quad operands{near.high, far.high, near.low, far.low};
      if constexpr (kOne) operands = {near.high, far.high, to_tf32(next[k]), to_tf32(next[k + 4])};
      store_quad(quads + operands_at(point % kColumnsOfProduct, k), operands);
    }
  }
}

// z += <x, y> of this warp's rows and the tile's columns.
template <bool kOne, bool kWhole>
__device__ __forceinline__ void add_products(const float* x, const float* y, int features, float (&z)[kProducts][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, own = operands_at(lane / 4, lane % 4);
  constexpr int kOfQuad = kGroups / kQuads<kOne>, kTurns = kOne || kWhole ? 2 : 1;  // as registers allow
#pragma unroll kTurns
  for (int quad = 0; quad < kQuads<kOne> && quad * kOfQuad * kGroup < features; ++quad) {
    Split a[kOfQuad][4];
#pragma unroll
    for (int group = 0; group < kOfQuad; ++group) {
      const Quad rows = load_quad(x + (quad * kOfQuad + group) * kOperands + own);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[group][i] = Split(rows.value[i]);
    }
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      const Quad b = load_quad(y + (n * kQuads<kOne> + quad) * kOperands + own);
      if constexpr (kOne) {
        multiply_high(z[n], a[0], {b.value[0], b.value[1]});
        multiply_high(z[n], a[1], {b.value[2], b.value[3]});
      } else {
        multiply_split(z[n], a[0], {b.value[0], b.value[1]}, {b.value[2], b.value[3]});
      }
    }
  }
}

template <bool kOne, bool kWhole>
__global__ void __launch_bounds__(kWarps* kWarp, 4)
    product_half_step_kernel(const __grid_constant__ SinkhornHalfStep step) {
  float* x = static_cast<float*>(dynamic_shared());
  float* y = x + kWarps * kKept * kOperands;
  float* offsets = y + kProducts * kQuads<kOne> * kOperands;  // 2 x 64, in turn
  float* sums = offsets + 2 * kTile;                          // one for every warp
  const Pairs<float>& pairs = step.pairs;
  const int64_t tiles = row_tiles(pairs.rows);
  const int features = static_cast<int>(pairs.features);
  const int64_t problem = flat_block() / tiles, tile = flat_block() % tiles;
  if (problem >= pairs.batch) return;
  // t, or already t + 1 where the first block of the problem has decided: that it goes on, either way.
  if (read_relaxed(step.decision.n_iter + problem) < step.decision.t) return;
  if (step.own == nullptr && !goes_on(step.decision, problem, tile == 0, sums)) return;
  const Stage<float> stage = stage_of(step.decision, problem);
  const float inverse = 1.0f / stage.epsilon, factor = factor_of<SquaredEuclidean>(inverse);
  const int64_t row = tile * kTile;
  const Points<kWhole> of_x{pairs.x + (problem * pairs.rows + row) * pairs.features, pairs.rows - row, features};
  const Side side{stage.averages() ? step.averaged_from : step.from, step.y_squares, step.other};
  const bool stays = features <= kKept * kGroup;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int pair = lane % 4 * 2;  // its first column of every product
  float top[2] = {-infinity<float>(), -infinity<float>()}, total[2] = {};
  for (int64_t column = 0, turn = 0; column < pairs.columns; column += kTile, turn ^= 1) {
    float* own_offsets = offsets + turn * kTile;
    stage_offsets(side, problem * pairs.columns + column, pairs.columns - column, inverse, own_offsets);
    const Points<kWhole> of_y{pairs.y + (problem * pairs.columns + column) * pairs.features, pairs.columns - column,
                              features};
    float z[kProducts][4] = {};
    for (int feature = 0; feature < features; feature += kGroups * kGroup) {
      const int group = stays ? static_cast<int>(feature) / kGroup : 0;
      if (column > 0 || feature > 0) __syncthreads();  // what was there is read
      if (column == 0 || !stays) stage_rows(of_x, feature, x + group * kOperands);
      stage_columns<kOne>(of_y, feature, y);
      __syncthreads();
      add_products<kOne, kWhole>(x + (warp * kKept + group) * kOperands, y, features - feature, z);
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

template <bool kOne, bool kWhole>
const char* launch_half_step(const SinkhornHalfStep& step, void* stream) {
  const int64_t blocks = step.pairs.batch * row_tiles(step.pairs.rows);
  const size_t floats = (kWarps * kKept + kProducts * kQuads<kOne>)*kOperands + 2 * kTile + kWarps;
  return launch(product_half_step_kernel<kOne, kWhole>, flat_grid(blocks), dim3(kWarps * kWarp), floats * sizeof(float),
                stream, step);
}

template <bool kOne>
const char* half_step(const SinkhornHalfStep& step, void* stream) {
  const Pairs<float>& pairs = step.pairs;
  const bool whole =
      pairs.features % (kGroups * kGroup) == 0 && is_vector_aligned(pairs.x) && is_vector_aligned(pairs.y);
  return whole ? launch_half_step<kOne, true>(step, stream) : launch_half_step<kOne, false>(step, stream);
}

}  // namespace

const char* sinkhorn_product_half_step_cuda(const SinkhornHalfStep& step, void* stream) {
  return step.pairs.allow_tf32 ? half_step<true>(step, stream) : half_step<false>(step, stream);
}

}  // namespace tilewise
