// Problems of at most 64 x 64 on CUDA, as their threads hold them: a problem of up to 4 x 4 is one thread's, in its
// registers (Single), a larger one is that of lanes of a warp (Group). Kernels are the same text for both.
//
// Lines are one number for every row, or for every column; a thread has some of each. Exponents are of 2: scores are
// factor C_ij + an offset, and their sums along a line are had from the offsets of the other side.
#pragma once

#include "common/team.cuh"
#include "sinkhorn/sinkhorn_launch.h"

namespace tilewise {

// log2 sum 2^score, -inf where every pair is forbidden: kLowest then leaves terms of 0. The logarithm's error is no
// larger than what the exponentials leave in the sum.
template <int K>
__device__ __forceinline__ float log_sum(const float (&score)[K]) {
  float top = kLowest;
#pragma unroll
  for (int k = 0; k < K; ++k) top = fmaxf(top, score[k]);
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) sum += fast_exp2(score[k] - top);
  return top + fast_log2(sum);
}

// score becomes upstream times softmax(score + log marginal) / marginal. A term without its marginal, which may be 0,
// may be too large: a finite one times 0 is 0.
template <int K>
__device__ __forceinline__ void pull(float (&score)[K], const float* marginal, float upstream) {
  float top = kLowest;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (marginal[k] > 0.0f) top = fmaxf(top, score[k]);
  }
  float total = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    score[k] = fast_exp2(fminf(score[k] - top, 115.0f));
    total += marginal[k] * score[k];
  }
  const float scale = total > 0.0f ? fast_divide(upstream, total) : 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) score[k] *= scale;
}

// -d log2 sum 2^score of an update, 0 where every pair is forbidden
__device__ __forceinline__ float updated(float log_sum, float damp) {
  return log_sum == -infinity<float>() ? 0.0f : -damp * log_sum;
}

template <typename Cost>
__device__ __forceinline__ float cost_of(const Pairs<float>& pairs, int64_t problem, int row, int column) {
  if constexpr (kIsMatrix<Cost>) {
    return pairs.matrix[problem * pairs.batch_stride + row * pairs.row_stride + column * pairs.column_stride];
  } else {
    const float* x = pairs.x + (problem * pairs.rows + row) * pairs.features;
    const float* y = pairs.y + (problem * pairs.columns + column) * pairs.features;
    float z = 0.0f;
    for (int64_t k = 0; k < pairs.features; ++k) z = Cost::accumulate(z, x[k], y[k]);
    return Cost::finish(z);
  }
}

template <int kLines>
struct Lines {
  float value[kLines] = {};
};

// Which problem a thread is at, and its part of it: lines lane, lane + kLanes, ..
template <int kLanesOfProblem, int kLinesOfLane>
class Place {
 public:
  static constexpr int kLanes = kLanesOfProblem;
  static constexpr int kLines = kLinesOfLane;
  using Line = Lines<kLines>;

  __device__ explicit Place(const Pairs<float>& pairs)
      : index_((flat_block() * blockDim.x + threadIdx.x) / kLanes),
        live_(index_ < pairs.batch),
        rows_(live_ ? static_cast<int>(pairs.rows) : 0),
        columns_(live_ ? static_cast<int>(pairs.columns) : 0),
        lane_(threadIdx.x % kLanes) {}

  __device__ int64_t index() const { return index_; }
  __device__ bool live() const { return live_; }
  __device__ int rows() const { return rows_; }
  __device__ int columns() const { return columns_; }
  __device__ int lane() const { return kLanes == 1 ? 0 : lane_; }

  template <typename Function>
  __device__ __forceinline__ void each_line(Function f) const {
#pragma unroll
    for (int u = 0; u < kLines; ++u) f(u, lane() + u * kLanes);
  }

  __device__ Line load(const float* values, int size) const {
    Line lines;
    each_line([&](int u, int i) { lines.value[u] = i < size ? values[index_ * size + i] : 0.0f; });
    return lines;
  }
  __device__ void store(float* values, int size, const Line& lines) const {
    each_line([&](int u, int i) {
      if (i < size) values[index_ * size + i] = lines.value[u];
    });
  }

  // Of one number of every lane.
  template <typename T>
  __device__ T sum(T value) const {
    return over_lanes<kLanes>(value, Plus{});
  }
  __device__ bool any(bool value) const { return kLanes == 1 ? value : __any_sync(0xffffffffu, value); }

 private:
  int64_t index_;
  bool live_;
  int rows_, columns_, lane_;
};

template <int kLines>
__device__ __forceinline__ Lines<kLines> log2_of(const Lines<kLines>& lines) {
  Lines<kLines> logs;
#pragma unroll
  for (int u = 0; u < kLines; ++u) logs.value[u] = ::log2f(lines.value[u]);
  return logs;
}

template <int K>
class Single : public Place<1, K> {
 public:
  using Line = Lines<K>;
  static constexpr int kThreads = 128;
  static constexpr int kProblems = kThreads;
  static constexpr int kSharedFloats = 0;

  __device__ Single(const Pairs<float>& pairs, void*) : Place<1, K>(pairs) {
    with_cost(pairs.cost, [&](auto cost) { load_costs(cost, pairs); });
  }

  __device__ __forceinline__ Line row_sums(const Line& of_columns, float factor) const {
    return sums<1, K>(of_columns, factor);
  }
  __device__ __forceinline__ Line column_sums(const Line& of_rows, float factor) const {
    return sums<K, 1>(of_rows, factor);
  }

  __device__ __forceinline__ Line pull_rows(const Line& of_columns, const Line& b, float factor, const Line& upstream) {
    return pulled<1, K>(of_columns, b, factor, upstream);
  }
  __device__ __forceinline__ Line pull_columns(const Line& of_rows, const Line& a, float factor, const Line& upstream) {
    return pulled<K, 1>(of_rows, a, factor, upstream);
  }

  template <typename Function>
  __device__ __forceinline__ void each_gradient(Function f) const {
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        if (i < this->rows() && j < this->columns()) f(i, j, costs_[i * K + j], gradients_[i * K + j]);
      }
    }
  }

 private:
  template <typename Cost>
  __device__ __forceinline__ void load_costs(Cost, const Pairs<float>& pairs) {
    const int64_t index = this->index();
    float z[K * K] = {};
    if constexpr (!kIsMatrix<Cost>) {
      const float *x = pairs.x + index * pairs.rows * pairs.features,
                  *y = pairs.y + index * pairs.columns * pairs.features;
      for (int64_t k = 0; k < pairs.features; ++k) {
        Line of_x, of_y;
        this->each_line([&](int, int i) {
          if (i < this->rows()) of_x.value[i] = x[i * pairs.features + k];
          if (i < this->columns()) of_y.value[i] = y[i * pairs.features + k];
        });
#pragma unroll
        for (int i = 0; i < K * K; ++i) z[i] = Cost::accumulate(z[i], of_x.value[i / K], of_y.value[i % K]);
      }
    }
#pragma unroll
    for (int i = 0; i < K * K; ++i) {
      costs_[i] = infinity<float>();
      if (i / K >= this->rows() || i % K >= this->columns()) continue;
      if constexpr (kIsMatrix<Cost>) {
        costs_[i] = cost_of<Cost>(pairs, index, i / K, i % K);
      } else {
        costs_[i] = Cost::finish(z[i]);
      }
    }
  }

  // Of lines kNext apart, with pairs kStep apart.
  template <int kStep, int kNext>
  __device__ __forceinline__ void scores(int line, const Line& offsets, float factor, float (&score)[K]) const {
#pragma unroll
    for (int k = 0; k < K; ++k) score[k] = fmaf(factor, costs_[line * kNext + k * kStep], offsets.value[k]);
  }
  template <int kStep, int kNext>
  __device__ __forceinline__ Line sums(const Line& offsets, float factor) const {
    Line result;
    this->each_line([&](int, int i) {
      float score[K];
      scores<kStep, kNext>(i, offsets, factor, score);
      result.value[i] = log_sum(score);
    });
    return result;
  }
  template <int kStep, int kNext>
  __device__ __forceinline__ Line pulled(const Line& offsets, const Line& marginal, float factor,
                                         const Line& upstream) {
    Line across;
    this->each_line([&](int, int i) {
      float score[K];
      scores<kStep, kNext>(i, offsets, factor, score);
      pull(score, marginal.value, upstream.value[i]);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        float& gradient = gradients_[i * kNext + k * kStep];
        gradient = fmaf(marginal.value[k], score[k], gradient);
        across.value[k] += score[k];
      }
    });
    return across;
  }

  float costs_[K * K];
  float gradients_[K * K] = {};
};

// min(K, 32) lanes, K a power of two. Matrices lie in shared memory with a pitch of K + 1, so that rows and columns are
// both read without conflicts: the costs, and with gradients their sum so far and what the last pull was.
template <int K, bool kGradients = false>
class Group : public Place<(K < kWarp ? K : kWarp), (K < kWarp ? 1 : K / kWarp)> {
  using Base = Place<(K < kWarp ? K : kWarp), (K < kWarp ? 1 : K / kWarp)>;
  static constexpr int kPitch = K + 1;
  static constexpr int kMatrix = K * kPitch;
  static constexpr int kFloats = (kGradients ? 3 : 1) * kMatrix + 2 * K;  // of a problem

 public:
  using Line = typename Base::Line;
  static constexpr int kThreads = K < kWarp ? 128 : kWarp;
  static constexpr int kProblems = kThreads / Base::kLanes;
  static constexpr int kSharedFloats = kProblems * kFloats;
  static_assert(kSharedFloats * sizeof(float) <= 99 << 10, "of a block on compute capability 8.6 to 12.0");

  __device__ Group(const Pairs<float>& pairs, void* shared) : Base(pairs) {
    offsets_ = static_cast<float*>(shared) + threadIdx.x / Base::kLanes * kFloats;
    marginals_ = offsets_ + K;
    costs_ = marginals_ + K;
    for (int i = this->lane(); i < K * K; i += Base::kLanes) {
      const int row = i / K, column = i % K, at = row * kPitch + column;
      costs_[at] = row < this->rows() && column < this->columns() ? cost(pairs, row, column) : infinity<float>();
      if (kGradients) costs_[kMatrix + at] = 0.0f;
    }
  }

  // Of every row, or column, of its lanes.
  __device__ __forceinline__ Line row_sums(const Line& of_columns, float factor) const {
    return sums(1, kPitch, of_columns, factor);
  }
  __device__ __forceinline__ Line column_sums(const Line& of_rows, float factor) const {
    return sums(kPitch, 1, of_rows, factor);
  }

  // What an update of the rows, or columns, leaves for the other side: the sum of W / marginal along it. W joins the
  // gradient of the scores.
  __device__ __forceinline__ Line pull_rows(const Line& of_columns, const Line& b, float factor,
                                            const Line& upstream) const {
    return pulled(1, kPitch, of_columns, b, factor, upstream);
  }
  __device__ __forceinline__ Line pull_columns(const Line& of_rows, const Line& a, float factor,
                                               const Line& upstream) const {
    return pulled(kPitch, 1, of_rows, a, factor, upstream);
  }

  // f(row, column, cost, gradient of the score), once for every pair.
  template <typename Function>
  __device__ __forceinline__ void each_gradient(Function f) const {
    __syncwarp();
    this->each_line([&](int, int i) {
      const float* row = costs_ + i * kPitch;
      for (int j = 0; i < this->rows() && j < this->columns(); ++j) f(i, j, row[j], row[kMatrix + j]);
    });
  }

 private:
  __device__ float cost(const Pairs<float>& pairs, int row, int column) const {
    return with_cost(pairs.cost, [&](auto cost) { return cost_of<decltype(cost)>(pairs, this->index(), row, column); });
  }

  // To all lanes, after all have read what was there.
  __device__ __forceinline__ void share(const Line& offsets) const {
    __syncwarp();
    this->each_line([&](int u, int i) { offsets_[i] = offsets.value[u]; });
    __syncwarp();
  }
  __device__ __forceinline__ void share(const Line& offsets, const Line& marginal) const {
    __syncwarp();
    this->each_line([&](int u, int i) { marginals_[i] = marginal.value[u]; });
    share(offsets);
  }

  // Of a line whose pairs are `step` apart. Without gradients one line after the other: two at once take registers that
  // more problems can have.
  __device__ __forceinline__ void scores(const float* costs, int step, float factor, float (&score)[K]) const {
    if constexpr (Base::kLines > 1 && !kGradients) __syncwarp();
#pragma unroll
    for (int k = 0; k < K; ++k) score[k] = fmaf(factor, costs[k * step], offsets_[k]);
  }
  // Of lines `next` apart.
  __device__ __forceinline__ Line sums(int step, int next, const Line& offsets, float factor) const {
    share(offsets);
    Line result;
    this->each_line([&](int u, int i) {
      float score[K];
      scores(costs_ + i * next, step, factor, score);
      result.value[u] = log_sum(score);
    });
    return result;
  }
  __device__ __forceinline__ Line pulled(int step, int next, const Line& offsets, const Line& marginal, float factor,
                                         const Line& upstream) const {
    share(offsets, marginal);
    float *const gradients = costs_ + kMatrix, *const last = gradients + kMatrix;
    this->each_line([&](int u, int i) {
      float score[K];
      scores(costs_ + i * next, step, factor, score);
      pull(score, marginals_, upstream.value[u]);
#pragma unroll
      for (int k = 0; k < K; ++k) last[i * next + k * step] = score[k];
      add_to(gradients + i * next, step, score);
    });
    __syncwarp();
    Line across;
    this->each_line([&](int u, int i) {
#pragma unroll
      for (int k = 0; k < K; ++k) across.value[u] += last[i * step + k * next];
    });
    return across;
  }

  // By eights, which are read before one is written.
  __device__ __forceinline__ void add_to(float* gradients, int step, const float (&terms)[K]) const {
#pragma unroll
    for (int first = 0; first < K; first += 8) {
      float sum[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] = fmaf(marginals_[first + k], terms[first + k], gradients[(first + k) * step]);
#pragma unroll
      for (int k = 0; k < 8; ++k) gradients[(first + k) * step] = sum[k];
    }
  }

  float *offsets_, *marginals_, *costs_;
};

// Calls f with the way that problems of a size are held.
template <bool kGradients, typename Function>
const char* with_holder(const Pairs<float>& pairs, Function f) {
  const int64_t size = pairs.rows > pairs.columns ? pairs.rows : pairs.columns;
  if (size <= 4) return f(std::type_identity<Single<4>>{});
  if (size <= 8) return f(std::type_identity<Group<8, kGradients>>{});
  if (size <= 16) return f(std::type_identity<Group<16, kGradients>>{});
  if (size <= 32) return f(std::type_identity<Group<32, kGradients>>{});
  return f(std::type_identity<Group<kSmall, kGradients>>{});
}

template <typename Holder>
dim3 grid_of(const Pairs<float>& pairs) {
  return flat_grid((pairs.batch + Holder::kProblems - 1) / Holder::kProblems);
}

}  // namespace tilewise
