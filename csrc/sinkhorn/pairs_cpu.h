// Tiles of z (sinkhorn.h) on the CPU: a view of the given matrix, a product of points, or their distances. Squares of
// few features come from differences, which cancel nothing: z = |x - y|^2, factor = -1/eps, s = 0.
#pragma once

#include <utility>

#include "common/gemm_tile.h"
#include "sinkhorn/sinkhorn_cpu.h"

#if defined(TILEWISE_ISA)
namespace tilewise::TILEWISE_ISA {

constexpr int64_t kTileRows = 24;
constexpr int64_t kTileColumns = 512;
constexpr int64_t kMinProducts = 16;  // features from which products are worth their cancellation

template <typename T>
TILEWISE_FN T largest(Vector<T> v) {
  T result = v[0];
  for (int l = 1; l < kLanes<T>; ++l) result = v[l] > result ? v[l] : result;
  return result;
}

template <typename T>
TILEWISE_FN T total(Vector<T> v) {
  T result = v[0];
  for (int l = 1; l < kLanes<T>; ++l) result += v[l];
  return result;
}

// The points of one side, as rows and with features side by side.
template <typename T>
struct Side {
  int64_t count = 0;
  const T* points = nullptr;    // (count, features)
  const T* features = nullptr;  // (features, padded count)
  const T* squares = nullptr;   // (count,) |x|^2 where the shifts want it, else 0
};

// Pairs of one problem.
template <typename T>
struct View {
  int32_t cost = 0;  // its place in PairCosts
  int64_t features = 0;
  Side<T> x;
  Side<T> y;
  const T* matrix = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;

  View transposed() const {
    View result = *this;
    std::swap(result.x, result.y);
    std::swap(result.row_stride, result.column_stride);
    return result;
  }

  bool by_products() const {
    return features >= kMinProducts && with_cost(cost, [](auto cost) { return decltype(cost)::kByProducts; });
  }
  T factor(T epsilon) const { return (by_products() ? T(2) : T(-1)) / epsilon; }
  T shift(const Side<T>& side, int64_t i, T epsilon) const { return by_products() ? side.squares[i] / epsilon : T(0); }
};

template <typename T>
static Side<T> packed_side(const T* points, int64_t count, int64_t features, T*& scratch) {
  const int64_t wide = padded(count);
  T* columns = scratch;
  T* squares = scratch + features * wide;
  scratch += (features + 1) * wide;
  for (int64_t i = 0; i < count; ++i) {
    T square = 0;
    for (int64_t k = 0; k < features; ++k) {
      const T value = points[i * features + k];
      columns[k * wide + i] = value;
      square += value * value;
    }
    squares[i] = square;
  }
  for (int64_t k = 0; k < features; ++k) {
    for (int64_t i = count; i < wide; ++i) columns[k * wide + i] = T(0);
  }
  return {count, points, columns, squares};
}

// Takes packed_elements from the scratch.
template <typename T>
static View<T> view_of(const Pairs<T>& pairs, int64_t index, T*& scratch) {
  View<T> view;
  view.cost = pairs.cost;
  view.x.count = pairs.rows;
  view.y.count = pairs.columns;
  if (pairs.is_matrix()) {
    view.matrix = pairs.matrix + index * pairs.batch_stride;
    view.row_stride = pairs.row_stride;
    view.column_stride = pairs.column_stride;
    return view;
  }
  view.features = pairs.features;
  view.x = packed_side(pairs.x + index * pairs.rows * pairs.features, pairs.rows, pairs.features, scratch);
  view.y = packed_side(pairs.y + index * pairs.columns * pairs.features, pairs.columns, pairs.features, scratch);
  return view;
}

template <typename Cost, typename T>
static void from_differences(const View<T>& view, int64_t row, int64_t rows, int64_t column, int64_t columns, T* tile) {
  const int64_t wide = padded(view.y.count);
  for (int64_t i = 0; i < rows; ++i) {
    const T* point = view.x.points + (row + i) * view.features;
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      Vector<T> sum = {};
      for (int64_t k = 0; k < view.features; ++k) {
        sum = Cost::accumulate(sum, Vector<T>{} + point[k], load_vector(view.y.features + k * wide + column + j));
      }
      for (int l = 0; l < kLanes<T>; ++l) sum[l] = Cost::finish(sum[l]);
      store_vector(sum, tile + i * kTileColumns + j);
    }
  }
}

// z of up to kTileRows x kTileColumns pairs; returns where it lies, its rows `stride` apart: in the matrix or in
// `tile`. Of a row only `columns` values may be read.
template <typename T>
static const T* form_tile(const View<T>& view, int64_t row, int64_t rows, int64_t column, int64_t columns, T* tile,
                          int64_t& stride) {
  stride = kTileColumns;
  if (view.by_products()) {
    Product<T> product{.rows = rows, .columns = padded(columns), .depth = view.features};
    product.a = view.x.points + row * view.features;
    product.a_row = view.features;
    product.a_depth = 1;
    product.b = view.y.features + column;
    product.b_depth = padded(view.y.count);
    product.c = tile;
    product.c_row = kTileColumns;
    multiply_block(product);
    return tile;
  }
  const bool formed = with_cost(view.cost, [&](auto cost) {
    if constexpr (!kIsMatrix<decltype(cost)>) from_differences<decltype(cost)>(view, row, rows, column, columns, tile);
    return !kIsMatrix<decltype(cost)>;
  });
  if (formed) return tile;
  const T* from = view.matrix + row * view.row_stride + column * view.column_stride;
  if (view.column_stride == 1) {
    stride = view.row_stride;
    return from;
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) tile[i * kTileColumns + j] = from[i * view.row_stride + j * view.column_stride];
  }
  return tile;
}

// f(row, column, columns, z) for the rows [begin, end) and each block of columns, z the first of the row's values.
// `tile` has kTileRows x kTileColumns; `finish(row, rows)` follows the last block of a group of rows.
template <typename T, typename Function, typename Finish>
TILEWISE_FN void for_tiles(const View<T>& view, int64_t begin, int64_t end, T* tile, const Function& f,
                           const Finish& finish) {
  for (int64_t row = begin; row < end; row += kTileRows) {
    const int64_t rows = end - row < kTileRows ? end - row : kTileRows;
    for (int64_t column = 0; column < view.y.count; column += kTileColumns) {
      const int64_t columns = view.y.count - column < kTileColumns ? view.y.count - column : kTileColumns;
      int64_t stride = 0;
      const T* z = form_tile(view, row, rows, column, columns, tile, stride);
      for (int64_t i = 0; i < rows; ++i) f(row + i, column, columns, z + i * stride);
    }
    finish(row, rows);
  }
}

}  // namespace tilewise::TILEWISE_ISA
#endif
