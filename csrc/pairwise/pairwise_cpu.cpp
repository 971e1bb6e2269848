// The pairwise engine on the CPU, for one instruction set: a row is walked in lanes, once per fold of its loss.
#include <memory>

#include "pairwise/losses.h"

namespace tilewise::TILEWISE_ISA {
namespace {

template <typename T>
TILEWISE_FN T initial(Sum) {
  return T(0);
}
template <typename T>
TILEWISE_FN T initial(Max) {
  return -infinity<T>();
}
template <typename T>
TILEWISE_FN T initial(Min) {
  return infinity<T>();
}

template <typename T>
TILEWISE_FN T combined(Sum, T a, T b) {
  return a + b;
}
template <typename T>
TILEWISE_FN T combined(Max, T a, T b) {
  return b > a ? b : a;
}
template <typename T>
TILEWISE_FN T combined(Min, T a, T b) {
  return b < a ? b : a;
}

template <typename T>
class Row {
 public:
  static constexpr int kLanes = 256 / sizeof(T);  // accumulators of a fold: enough to hide the latency of a sum

  // `relation` has room for one value per column.
  Row(const PairwiseChunk<T>& chunk, int64_t row, int32_t* relation)
      : chunk_(chunk),
        row_(row),
        columns_(chunk.columns),
        scale_(*chunk.scale),
        bias_(chunk.bias != nullptr ? *chunk.bias : T(0)),
        s_(chunk.similarities + row * chunk.row_stride),
        relation_(relation) {
    const Relations<T>& relations = chunk.relations;
    const int64_t label = relations.x_labels[row];
    const int64_t* labels = relations.y_labels;
#pragma omp simd
    for (int64_t j = 0; j < columns_; ++j) relation[j] = labels[j] == label ? 1 : -1;
    const int64_t self = row + relations.self_offset;
    if (relations.excludes_self && self >= 0 && self < columns_) relation[self] = 0;
    if (relations.guide != nullptr) mask_by_guide(relations.guide + row * relations.guide_stride, relation);
  }

  template <typename... Ops, typename Function>
  TILEWISE_FN Values<T, sizeof...(Ops)> fold(const Function& f) const;

  template <typename Function>
  int64_t first(const Function& f) const {
    for (int64_t j = 0; j < columns_; ++j) {
      if (f(z(j), relation_[j])) return j;
    }
    return -1;
  }

  void finish(T loss) { set(loss, T(1)); }

  void skip() {
    set(T(0), T(0));
    if (!chunk_.wants_gradient) return;
    for (int64_t j = 0; j < columns_; ++j) s_[j] = T(0);
    chunk_.bias_rows[row_] = T(0);
  }

  bool wants_gradient() const { return chunk_.wants_gradient; }

 private:
  T z(int64_t j) const { return scale_ * s_[j] + bias_; }

  void set(T loss, T active) {
    chunk_.loss_rows[row_] = loss;
    chunk_.active_rows[row_] = active;
  }

  const PairwiseChunk<T>& chunk_;
  int64_t row_;
  int64_t columns_;
  T scale_;
  T bias_;
  T* s_;
  int32_t* relation_;
};

}  // namespace
}  // namespace tilewise::TILEWISE_ISA
