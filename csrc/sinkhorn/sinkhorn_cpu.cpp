// Sinkhorn on the CPU, for one instruction set: solutions (solver_cpu.h), plans and their products.
#include "sinkhorn/solver_cpu.h"

namespace tilewise::TILEWISE_ISA {
namespace {

template <typename T>
void solve(const SinkhornCall<T>& call, int64_t index, T* scratch, const Parallel& parallel) {
  Solver<T>(call, index, scratch, parallel).solve(index);
}

// What a plan is made of: offsets of both sides, those of the columns at the end of the scratch.
template <typename T>
struct PlanOf {
  PlanOf(const SinkhornApply<T>& call, int64_t index, T*& scratch)
      : view(view_of(call.pairs, index, scratch)), factor(view.factor(call.epsilon[index])) {
    const int64_t n = call.pairs.rows, m = call.pairs.columns;
    rows = std::exchange(scratch, scratch + padded(n));
    columns = std::exchange(scratch, scratch + padded(m));
    const T epsilon = call.epsilon[index];
    fill(view.x, call.f + index * n, call.a == nullptr ? nullptr : call.a + index * n, epsilon, rows);
    fill(view.y, call.g + index * m, call.b == nullptr ? nullptr : call.b + index * m, epsilon, columns);
  }

  void fill(const Side<T>& side, const T* potential, const T* marginal, T epsilon, T* out) const {
    std::copy(potential, potential + side.count, out);
    for (int64_t i = 0; i < side.count; ++i) out[i] /= epsilon;
    fill_offset(view, side, out, marginal, epsilon, out);
  }

  View<T> view;
  T factor;
  T* rows;
  T* columns;
};

template <typename T>
void plan(const SinkhornApply<T>& call, int64_t index, T* scratch, const Parallel& parallel) {
  const PlanOf<T> plan(call, index, scratch);
  const int64_t n = call.pairs.rows, m = call.pairs.columns;
  T* all = call.out + index * n * m;
  parallel((n + kTileRows - 1) / kTileRows, [&](int64_t begin, int64_t end) {
    alignas(kVectorBytes) T tile[kTileRows * kTileColumns];
    const auto block = [&](int64_t row, int64_t column, int64_t columns, const T* z) {
      T* out = all + row * m + column;
      for_vectors(z, columns, [&](int64_t j, Vector<T> value) {
        value = fast_exp(plan.factor * value + (load_vector(plan.columns + column + j) + plan.rows[row]));
        if (j + kLanes<T> <= columns) return store_vector(value, out + j);
        store_some<T>(value, columns - j, out + j);
      });
    };
    for_tiles(plan.view, begin * kTileRows, end * kTileRows < n ? end * kTileRows : n, tile, block,
              [](int64_t, int64_t) {});
  });
}

template <typename T>
void apply(const SinkhornApply<T>& call, int64_t index, T* scratch, const Parallel& parallel) {
  const PlanOf<T> plan(call, index, scratch);
  const int64_t n = call.pairs.rows, m = call.pairs.columns, wide = padded(m);
  const T* h = call.h == nullptr ? nullptr : call.h + index * n * call.weights;
  T* k = scratch;  // (weights, columns)
  for (int64_t q = 0; h != nullptr && q < call.weights; ++q) {
    for (int64_t j = 0; j < wide; ++j) k[q * wide + j] = j < m ? call.k[(index * m + j) * call.weights + q] : T(0);
  }
  parallel((n + kTileRows - 1) / kTileRows, [&](int64_t first, int64_t last) {
    alignas(kVectorBytes) T tile[kTileRows * kTileColumns];
    alignas(kVectorBytes) T p[kTileRows * kTileColumns];
    for (int64_t row = first * kTileRows; row < n && row < last * kTileRows; row += kTileRows) {
      const int64_t rows = n - row < kTileRows ? n - row : kTileRows;
      for (int64_t column = 0; column < m; column += kTileColumns) {
        const int64_t columns = m - column < kTileColumns ? m - column : kTileColumns;
        int64_t stride = 0;
        const T* z = form_tile(plan.view, row, rows, column, columns, tile, stride);
        Product<T> product{.rows = rows, .columns = padded(columns), .depth = call.weights};
        if (h != nullptr) {
          product.a = h + row * call.weights;
          product.a_row = call.weights;
          product.a_depth = 1;
          product.b = k + column;
          product.b_depth = wide;
          product.c = p;
          product.c_row = kTileColumns;
          multiply_block(product);
        }
        for (int64_t i = 0; i < rows; ++i) {
          T* out = p + i * kTileColumns;
          for_vectors(z + i * stride, columns, [&](int64_t j, Vector<T> value) {
            Vector<T> weight =
                fast_exp(plan.factor * value + (load_vector(plan.columns + column + j) + plan.rows[row + i]));
            if (h != nullptr) weight *= load_vector(out + j);
            if (call.over_distance)
              weight = with_cost(plan.view.cost, [&](auto cost) { return cost.slope(weight, value); });
            store_vector(weight, out + j);
          });
        }
        product = {.rows = rows, .columns = call.values, .depth = columns};
        product.a = p;
        product.a_row = kTileColumns;
        product.a_depth = 1;
        product.b = call.v + (index * m + column) * call.values;
        product.b_depth = call.values;
        product.c = call.out + (index * n + row) * call.values;
        product.c_row = call.values;
        if (column > 0) {
          product.start = product.c;
          product.start_row = call.values;
          product.start_column = 1;
        }
        multiply_block(product);
      }
    }
  });
}

template <typename T>
constexpr SinkhornKernels<T> kernels{solve<T>, apply<T>, plan<T>};

}  // namespace

extern const ForTypes<SinkhornKernels> sinkhorn_kernels{kernels<float>, kernels<double>};

}  // namespace tilewise::TILEWISE_ISA
