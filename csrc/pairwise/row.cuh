// A row of similarities that the threads of a warp or of a block walk side by side, once per fold of the loss.
//
// Most pairs go four at a time, similarities and labels as vectors of 16 bytes, and are positives or negatives by their
// label alone. One by one go those that need a closer look: the columns around the row's own, what is left at the end
// of the row, and all of them where a guide has a say or a label takes more than 32 bits.
#pragma once

#include "common/vector.cuh"
#include "pairwise/fold.h"

namespace tilewise {

constexpr int kMostValues = 4;    // of a fold
constexpr int kPairVector = 4;    // pairs
constexpr int kVectorsAhead = 2;  // on their way to a thread before it uses one
constexpr uint32_t kApart = 8;    // vectors around the own column, a line of the cache

template <typename Storage>
class Row {
 public:
  using Similarities = Run<float, kPairVector>;
  using Labels = Run<int32_t, kPairVector>;

  __device__ Row(const PairwiseChunk<float>& chunk, int64_t row, uint32_t vectors)
      : chunk_(chunk),
        row_(row),
        scale_(*chunk.scale),
        bias_(chunk.bias != nullptr ? *chunk.bias : 0.0f),
        s_(chunk.similarities + row * chunk.row_stride),
        label_(chunk.relations.x_labels[row]),
        short_label_(static_cast<int32_t>(label_)),
        self_(chunk.relations.excludes_self ? row + chunk.relations.self_offset : -1) {
    const Relations<float>& relations = chunk.relations;
    if (vectors > 0 && label_ == short_label_ && *relations.too_long == 0) vectors_ = vectors;
    before_ = after_ = vectors_;
    if (self_ >= 0 && self_ < int64_t{vectors_} * kPairVector) {
      before_ = static_cast<uint32_t>(self_ / kPairVector) / kApart * kApart;
      after_ = before_ + kApart < vectors_ ? before_ + kApart : vectors_;
    }
    if (relations.guide == nullptr) return;
    int64_t positive = kNone;
    for (int64_t j = threadIdx.x; j < chunk_.columns && positive == kNone; j += blockDim.x) {
      if (relation(j) > 0) positive = j;
    }
    positive = least_over_row(positive);
    if (positive == kNone) return;
    guide_ = relations.guide + row * relations.guide_stride;
    most_ = guide_[positive] - relations.guide_margin;
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
    int64_t found = kNone;
    const auto look = [&](int64_t j, float z, int relation) {
      if (f(z, relation) && j < found) found = j;
    };
    walk(
        [&](uint32_t v, const Similarities& s, const Labels& labels) {
#pragma unroll
          for (int i = 0; i < kPairVector; ++i)
            look(int64_t{v} * kPairVector + i, z_of(s.value[i]), relation_by(labels.value[i]));
        },
        [&](int64_t j) { look(j, z_of(s_[j]), relation(j)); });
    found = least_over_row(found);
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
    Values<float, 1> sum{0.0f};
    write_all([&](int64_t, float s, int relation) {
      const float g = factor * f(z_of(s), relation);
      sum.value[0] += g;
      return g;
    });
    sum = over_row<Sum>(sum);
    if (threadIdx.x == 0) chunk_.bias_rows[row_] = sum.value[0];
  }

  template <typename Function>
  __device__ __forceinline__ float write_and_sum(const Function& f) {
    const float factor = upstream_of_row(chunk_.upstream, row_);
    Values<float, 2> sums{0.0f, 0.0f};
    write_all([&](int64_t, float s, int relation) {
      Values<float, 2> found = f(z_of(s), relation);
      found.value[0] *= factor;
      combine<Sum, Sum>(sums, found);
      return found.value[0];
    });
    sums = over_row<Sum, Sum>(sums);
    if (threadIdx.x == 0) chunk_.bias_rows[row_] = sums.value[0];
    return sums.value[1];
  }

  __device__ void write_two(int64_t a, float at_a, int64_t b, float at_b) {
    const float factor = upstream_of_row(chunk_.upstream, row_);
    const auto at = [&](int64_t j) { return factor * ((j == a ? at_a : 0.0f) + (j == b ? at_b : 0.0f)); };
    write_all([&](int64_t j, float, int) { return at(j); });
    if (threadIdx.x == 0) chunk_.bias_rows[row_] = factor * ((a >= 0 ? at_a : 0.0f) + (b >= 0 ? at_b : 0.0f));
  }

 private:
  static constexpr int64_t kNone = INT64_MAX;  // of columns

  // All pairs: together(v, similarities, labels) of the v-th vector, or alone(j).
  template <typename Together, typename Alone>
  __device__ __forceinline__ void walk(const Together& together, const Alone& alone) const {
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      const uint32_t end = part == 0 ? before_ : vectors_;
      uint32_t v = (part == 0 ? 0 : after_) + threadIdx.x;
#pragma unroll 1
      for (; v + (kVectorsAhead - 1) * blockDim.x < end; v += kVectorsAhead * blockDim.x)
        take<kVectorsAhead>(v, together);
#pragma unroll 1
      for (; v < end; v += blockDim.x) take<1>(v, together);
    }
    const int64_t apart = int64_t{after_ - before_} * kPairVector, end = int64_t{vectors_} * kPairVector;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < apart + chunk_.columns - end; i += blockDim.x)
      alone(i < apart ? int64_t{before_} * kPairVector + i : end + i - apart);
  }

  template <int kCount, typename Together>
  __device__ __forceinline__ void take(uint32_t v, const Together& together) const {
    Similarities s[kCount];
    Labels labels[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t begin = int64_t{v + i * blockDim.x} * kPairVector;
      s[i] = load_vectors<true, kPairVector>(s_ + begin);
      labels[i] = load_vectors<false, kPairVector>(chunk_.relations.short_labels + begin);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) together(v + i * blockDim.x, s[i], labels[i]);
  }

  // Writes g(j, s_j, relation) of all pairs, over the similarities or elsewhere.
  template <typename Function>
  __device__ __forceinline__ void write_all(const Function& g) const {
    Storage* out = static_cast<Storage*>(chunk_.gradient) + row_ * chunk_.row_stride;
    walk(
        [&](uint32_t v, const Similarities& s, const Labels& labels) {
          float of_pairs[kPairVector];
          const int64_t begin = int64_t{v} * kPairVector;
#pragma unroll
          for (int i = 0; i < kPairVector; ++i) of_pairs[i] = g(begin + i, s.value[i], relation_by(labels.value[i]));
          store_run(out + begin, narrow<Storage>(of_pairs));
        },
        [&](int64_t j) { from_float(g(j, s_[j], relation(j)), out[j]); });
  }

  template <typename... Ops, typename Function>
  __device__ __forceinline__ Values<float, sizeof...(Ops)> fold_as(const Function& f) {
    Values<float, sizeof...(Ops)> total{initial(Ops{})...};
    walk(
        [&](uint32_t, const Similarities& s, const Labels& labels) {
#pragma unroll
          for (int i = 0; i < kPairVector; ++i)
            combine<Ops...>(total, f(z_of(s.value[i]), relation_by(labels.value[i])));
        },
        [&](int64_t j) { combine<Ops...>(total, f(z_of(s_[j]), relation(j))); });
    return over_row<Ops...>(total);
  }

  static __device__ float initial(Sum) { return 0.0f; }
  static __device__ float initial(Max) { return -infinity<float>(); }
  static __device__ float initial(Min) { return infinity<float>(); }
  static __device__ float combined(Sum, float a, float b) { return a + b; }
  static __device__ float combined(Max, float a, float b) { return fmaxf(a, b); }
  static __device__ float combined(Min, float a, float b) { return fminf(a, b); }

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

  __device__ int64_t least_over_row(int64_t found) {
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
    return found;
  }

  // Two buffers in turn: who writes one again has passed the barrier after everybody read it.
  __device__ void* next_buffer() {
    turn_ ^= 1;
    return static_cast<char*>(dynamic_shared()) + turn_ * (blockDim.x / kWarp) * sizeof(Values<float, kMostValues>);
  }

  __device__ __forceinline__ float z_of(float s) const { return scale_ * s + bias_; }

  __device__ __forceinline__ int relation_by(int32_t short_label) const { return short_label == short_label_ ? 1 : -1; }

  __device__ __forceinline__ int relation(int64_t j) const {
    if (j == self_) return 0;
    if (chunk_.relations.y_labels[j] == label_) return 1;
    return guide_ != nullptr && guide_[j] > most_ ? 0 : -1;
  }

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
  int32_t short_label_;
  int64_t self_;
  uint32_t vectors_ = 0;  // of pairs that may go together
  uint32_t before_;       // those of them before the own column, and
  uint32_t after_;        // the first after it
  const float* guide_ = nullptr;
  float most_ = 0.0f;
  int turn_ = 0;
};

}  // namespace tilewise
