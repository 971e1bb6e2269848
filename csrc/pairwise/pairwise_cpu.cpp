// The pairwise engine on the CPU, for one instruction set: a row is walked by vectors, once per fold of its loss.
#include <algorithm>
#include <memory>
#include <utility>

#include "common/simd.h"
#include "pairwise/programs.h"

namespace tilewise::TILEWISE_ISA {
namespace {

// Columns that a fold takes together before it adds them to its totals: a long sum of small terms keeps its digits.
template <typename T>
constexpr int64_t kFolded = 64 * kLanes<T>;

template <typename T>
class Row {
 public:
  // As wide as T, so that comparisons select among vectors of T.
  using Relation = std::conditional_t<sizeof(T) == sizeof(float), int32_t, int64_t>;

  static size_t relations_of(int64_t columns) { return static_cast<size_t>(columns + kLanes<T>); }

  // `relation` has room for relations_of(columns) values: beyond the columns they are 0.
  Row(const PairwiseChunk<T>& chunk, int64_t row, Relation* relation)
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
    for (int64_t j = columns_; j < columns_ + kLanes<T>; ++j) relation[j] = 0;
    const int64_t self = row + relations.self_offset;
    if (relations.excludes_self && self >= 0 && self < columns_) relation[self] = 0;
    if (relations.guide != nullptr) mask_by_guide(relations.guide + row * relations.guide_stride);
  }

  template <typename... Ops, typename Function>
  auto fold(const Function& f) const {
    if constexpr (sizeof...(Ops) == 1) {
      const auto one = [&f](auto z, auto relation) { return values(f(z, relation)); };
      return fold_as<decltype(one), Ops...>(one, std::index_sequence_for<Ops...>{}).value[0];
    } else {
      return fold_as<Function, Ops...>(f, std::index_sequence_for<Ops...>{});
    }
  }

  template <typename Function>
  int64_t first(const Function& f) const {
    for (int64_t j = 0; j < columns_; ++j) {
      if (f(scale_ * s_[j] + bias_, relation_[j])) return j;
    }
    return -1;
  }

  void finish(T loss) { set(loss, T(1)); }

  void skip() {
    set(T(0), T(0));
    if (chunk_.wants_gradient) write_two(-1, T(0), -1, T(0));
  }

  bool wants_gradient() const { return chunk_.wants_gradient; }

  template <typename Function>
  void write(const Function& f) {
    write_all([&](int64_t j) { return f(z(j), relation(j)); });
  }

  template <typename Function>
  T write_and_sum(const Function& f) {
    Vector<T> total = {}, part = {};
    write_all([&](int64_t j) {
      const auto found = f(z(j), relation(j));
      part += found.value[1];
      if ((j + kLanes<T>) % kFolded<T> == 0) {
        total += part;
        part = Vector<T>{};
      }
      return found.value[0];
    });
    return over_lanes(total + part);
  }

  void write_two(int64_t a, T at_a, int64_t b, T at_b) {
    const T factor = upstream_of_row(chunk_.upstream, row_);
    T* out = gradient();
    for (int64_t j = 0; j < columns_; ++j) out[j] = T(0);
    if (a >= 0) out[a] += factor * at_a;
    if (b >= 0) out[b] += factor * at_b;
    chunk_.bias_rows[row_] = factor * ((a >= 0 ? at_a : T(0)) + (b >= 0 ? at_b : T(0)));
  }

 private:
  static T initial(Sum) { return T(0); }
  static T initial(Max) { return -infinity<T>(); }
  static T initial(Min) { return infinity<T>(); }
  template <typename V>
  static V combined(Sum, V a, V b) {
    return a + b;
  }
  template <typename V>
  static V combined(Max, V a, V b) {
    return b > a ? b : a;
  }
  template <typename V>
  static V combined(Min, V a, V b) {
    return b < a ? b : a;
  }

  // dL/dz of the pairs of a vector: f(j) of the first of them
  template <typename Function>
  void write_all(const Function& f) {
    const T factor = upstream_of_row(chunk_.upstream, row_);
    T* out = gradient();
    Vector<T> sums = {};
    for (int64_t j = 0; j < columns_; j += kLanes<T>) {
      const Vector<T> g = factor * f(j);
      sums += g;
      if (j + kLanes<T> <= columns_) {
        store_vector(g, out + j);
      } else {
        store_some<T>(g, columns_ - j, out + j);
      }
    }
    chunk_.bias_rows[row_] = over_lanes(sums);
  }

  static T over_lanes(Vector<T> values) {
    T sum = 0;
    for (int l = 0; l < kLanes<T>; ++l) sum += values[l];
    return sum;
  }

  template <typename Function, typename... Ops, size_t... kIndex>
  Values<T, sizeof...(Ops)> fold_as(const Function& f, std::index_sequence<kIndex...>) const {
    Vector<T> totals[] = {Vector<T>{} + initial(Ops{})...};
    for (int64_t begin = 0; begin < columns_; begin += kFolded<T>) {
      const int64_t end = std::min(begin + kFolded<T>, columns_);
      Vector<T> part[] = {Vector<T>{} + initial(Ops{})...};
      for (int64_t j = begin; j < end; j += kLanes<T>) {
        const auto found = f(z(j), relation(j));
        ((part[kIndex] = combined(Ops{}, part[kIndex], found.value[kIndex])), ...);
      }
      ((totals[kIndex] = combined(Ops{}, totals[kIndex], part[kIndex])), ...);
    }
    Values<T, sizeof...(Ops)> total{initial(Ops{})...};
    for (int l = 0; l < kLanes<T>; ++l)
      ((total.value[kIndex] = combined<T>(Ops{}, total.value[kIndex], totals[kIndex][l])), ...);
    return total;
  }

  Vector<T> z(int64_t j) const {
    if (j + kLanes<T> <= columns_) return scale_ * load_vector(s_ + j) + bias_;
    return scale_ * load_some(s_ + j, columns_ - j) + bias_;
  }

  Vector<Relation> relation(int64_t j) const { return load_vector(relation_ + j); }

  void mask_by_guide(const T* guide) {
    const int64_t positive = first([](T, Relation relation) { return relation > 0; });
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
  Relation* relation_;
};

template <typename T>
void run(const PairwiseChunk<T>& chunk, int64_t begin, int64_t end) {
  using Relation = typename Row<T>::Relation;
  const std::unique_ptr<Relation[]> relation(new Relation[Row<T>::relations_of(chunk.columns)]);
  const auto run_rows = [&](auto program) {
    for (int64_t i = begin; i < end; ++i) {
      Row<T> row(chunk, i, relation.get());
      run_program(program, row, chunk.parameters);
    }
  };
  with_program(chunk.program, run_rows, PairPrograms{});
}

}  // namespace

extern const PairwiseKernels pairwise_kernels{.run_float = run<float>, .run_double = run<double>};

}  // namespace tilewise::TILEWISE_ISA
