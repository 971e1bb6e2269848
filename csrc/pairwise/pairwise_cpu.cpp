// The pairwise engine on the CPU, for one instruction set: a row is walked in lanes, once per fold of its loss.
#include <memory>
#include <type_traits>
#include <utility>

#include "pairwise/losses.h"

namespace tilewise::TILEWISE_ISA {
namespace {

template <typename T>
class Row {
 public:
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
    if (relations.guide != nullptr) mask_by_guide();
  }

  template <typename... Ops, typename Function>
  Values<T, sizeof...(Ops)> fold(const Function& f) const {
    return fold_as<Function, Ops...>(f, std::index_sequence_for<Ops...>{});
  }

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
    T* out = gradient();
    for (int64_t j = 0; j < columns_; ++j) out[j] = T(0);
    chunk_.bias_rows[row_] = T(0);
  }

  bool wants_gradient() const { return chunk_.wants_gradient; }

  template <typename Function>
  void write(const Function& f) {
    const T factor = upstream_of_row(chunk_.upstream, row_);
    T* out = gradient();
    T sums[kLanes] = {};
    int64_t begin = 0;
    for (; begin + kLanes <= columns_; begin += kLanes) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) sums[l] += out[begin + l] = factor * weight(f, begin + l);
    }
    for (int l = 0; begin + l < columns_; ++l) sums[l] += out[begin + l] = factor * weight(f, begin + l);
    T sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += sums[l];
    chunk_.bias_rows[row_] = sum;
  }

 private:
  static constexpr int kLanes = 256 / sizeof(T);  // sums of a fold: enough to hide the latency of an addition

  static T initial(Sum) { return T(0); }
  static T initial(Max) { return -infinity<T>(); }
  static T initial(Min) { return infinity<T>(); }
  static T combined(Sum, T a, T b) { return a + b; }
  static T combined(Max, T a, T b) { return b > a ? b : a; }
  static T combined(Min, T a, T b) { return b < a ? b : a; }

  template <typename Function, typename... Ops, size_t... kIndex>
  Values<T, sizeof...(Ops)> fold_as(const Function& f, std::index_sequence<kIndex...>) const {
    T lanes[sizeof...(Ops)][kLanes];
    for (int l = 0; l < kLanes; ++l) ((lanes[kIndex][l] = initial(Ops{})), ...);
    int64_t begin = 0;
    for (; begin + kLanes <= columns_; begin += kLanes) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        const auto values = f(z(begin + l), relation_[begin + l]);
        ((lanes[kIndex][l] = combined(Ops{}, lanes[kIndex][l], values.value[kIndex])), ...);
      }
    }
    for (int l = 0; begin + l < columns_; ++l) {
      const auto values = f(z(begin + l), relation_[begin + l]);
      ((lanes[kIndex][l] = combined(Ops{}, lanes[kIndex][l], values.value[kIndex])), ...);
    }
    Values<T, sizeof...(Ops)> total{initial(Ops{})...};
    for (int l = 0; l < kLanes; ++l)
      ((total.value[kIndex] = combined(Ops{}, total.value[kIndex], lanes[kIndex][l])), ...);
    return total;
  }

  T z(int64_t j) const { return scale_ * s_[j] + bias_; }

  template <typename Function>
  T weight(const Function& f, int64_t j) const {
    if constexpr (std::is_invocable_v<Function, T, int, int64_t>) {
      return f(z(j), relation_[j], j);
    } else {
      return f(z(j), relation_[j]);
    }
  }

  void mask_by_guide() {
    const T* guide = chunk_.relations.guide + row_ * chunk_.relations.guide_stride;
    const int64_t positive = first([](T, int relation) { return relation > 0; });
    if (positive < 0) return;
    const T most = guide[positive] - chunk_.relations.guide_margin;
#pragma omp simd
    for (int64_t j = 0; j < columns_; ++j) relation_[j] = relation_[j] < 0 && guide[j] > most ? 0 : relation_[j];
  }

  T* gradient() const { return static_cast<T*>(chunk_.gradient) + row_ * chunk_.row_stride; }

  void set(T loss, T active) {
    chunk_.loss_rows[row_] = loss;
    chunk_.active_rows[row_] = active;
  }

  const PairwiseChunk<T>& chunk_;
  int64_t row_;
  int64_t columns_;
  T scale_;
  T bias_;
  const T* s_;
  int32_t* relation_;
};

template <typename T>
void run(const PairwiseChunk<T>& chunk, int64_t begin, int64_t end) {
  const std::unique_ptr<int32_t[]> relation(new int32_t[static_cast<size_t>(chunk.columns)]);
  for (int64_t i = begin; i < end; ++i) {
    Row<T> row(chunk, i, relation.get());
    run_loss(chunk.loss, chunk.parameters, row);
  }
}

}  // namespace

extern const PairwiseKernels pairwise_kernels{.run_float = run<float>, .run_double = run<double>};

}  // namespace tilewise::TILEWISE_ISA
