// Matrix products on the CPU that stream their factors where they lie: C = start + A B with few rows or columns, where
// a BLAS spends its time packing. A tile of C stays in registers while the depth passes by:
//
//   for k:  C[i, 0:n] += A[i, k] * B[k, 0:n]      6 rows, n = 1..kVectors vectors; A is broadcast, B is loaded
//
// Blocks of kDepth x (kBlockRows of A, kWidth of B) stay in the second-level cache. Every element of C sums its
// products in the same order whatever the number of threads.
#pragma once

#include <array>
#include <utility>

#include "common/isa.h"
#include "common/simd.h"

namespace tilewise {

template <typename T>
struct Product {
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t depth = 0;
  const T* a = nullptr;  // (rows, depth)
  int64_t a_row = 0;
  int64_t a_depth = 0;
  const T* b = nullptr;  // (depth, columns), columns side by side
  int64_t b_depth = 0;
  T* c = nullptr;  // (rows, columns)
  int64_t c_row = 0;
  int64_t c_column = 1;
  const T* start = nullptr;  // (rows, columns), may be c; null: 0
  int64_t start_row = 0;
  int64_t start_column = 0;
};

// Threads share a product by units of C, in rows of units or, where C is wide, in columns of them.
constexpr int64_t kUnitRows = 6;
constexpr int64_t kUnitColumns = 64;

template <typename T>
int64_t units_of(const Product<T>& product) {
  return ((product.rows + kUnitRows - 1) / kUnitRows) * ((product.columns + kUnitColumns - 1) / kUnitColumns);
}

struct GemmKernels {
  void (*multiply_float)(const Product<float>&, int64_t begin, int64_t end);  // units [begin, end)
  void (*multiply_double)(const Product<double>&, int64_t begin, int64_t end);
};
TILEWISE_DECLARE_KERNELS(GemmKernels, gemm_kernels)

#if defined(TILEWISE_ISA)
namespace TILEWISE_ISA {

constexpr int kVectors = kRegisters >= 32 ? 4 : 2;  // 6 x 4 of 32 registers hold sums, or 6 x 2 of 16
constexpr int64_t kDepth = 512;
constexpr int64_t kBlockRows = 96;

// `product` describes one tile of kRows x (up to kCount vectors) columns.
template <typename T, int kRows, int kCount>
static void multiply_tile(const Product<T>& product) {
  Vector<T> sums[kRows][kCount] = {};
  const bool vectors = product.c_column == 1 && product.columns == kCount * kLanes<T> &&
                       (product.start == nullptr || product.start_column == 1);
  if (vectors && product.start != nullptr) {
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kCount; ++j) __builtin_prefetch(product.start + i * product.start_row + j * kLanes<T>, 1);
    }
  }
  const T* a = product.a;
  const T* b = product.b;
  for (int64_t k = 0; k < product.depth; ++k, a += product.a_depth, b += product.b_depth) {
    Vector<T> row[kCount];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) row[j] = load_vector(b + j * kLanes<T>);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const T factor = a[i * product.a_row];
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) sums[i][j] += factor * row[j];
    }
  }
  if (vectors) {
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        if (product.start != nullptr) sums[i][j] += load_vector(product.start + i * product.start_row + j * kLanes<T>);
        store_vector(sums[i][j], product.c + i * product.c_row + j * kLanes<T>);
      }
    }
    return;
  }
  for (int64_t j = 0; j < product.columns; ++j) {
    for (int i = 0; i < kRows; ++i) {
      T sum = sums[i][j / kLanes<T>][j % kLanes<T>];
      if (product.start != nullptr) sum += product.start[i * product.start_row + j * product.start_column];
      product.c[i * product.c_row + j * product.c_column] = sum;
    }
  }
}

template <typename T, int... kIndex>
constexpr auto tile_table(std::integer_sequence<int, kIndex...>) {
  return std::array{multiply_tile<T, kIndex / kVectors + 1, kIndex % kVectors + 1>...};
}

template <typename T>
static Product<T> part_of(Product<T> product, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  product.a += row * product.a_row;
  product.b += column;
  product.c += row * product.c_row + column * product.c_column;
  if (product.start != nullptr) product.start += row * product.start_row + column * product.start_column;
  product.rows = rows;
  product.columns = columns;
  return product;
}

// All rows of a block against columns that fill whole vectors, or less than one.
template <typename T>
static void multiply_rows(const Product<T>& block) {
  static constexpr auto kTiles = tile_table<T>(std::make_integer_sequence<int, kUnitRows * kVectors>{});
  const int64_t vectors = (block.columns + kLanes<T> - 1) / kLanes<T>;
  for (int64_t row = 0; row < block.rows; row += kUnitRows) {
    const int64_t rows = block.rows - row < kUnitRows ? block.rows - row : kUnitRows;
    kTiles[(rows - 1) * kVectors + vectors - 1](part_of(block, row, rows, 0, block.columns));
  }
}

// The columns that do not fill a vector are read through a copy of theirs: memory ends where B ends.
template <typename T>
static void multiply_tail(Product<T> block) {
  alignas(kVectorBytes) T copy[kDepth * kLanes<T>] = {};
  for (int64_t k = 0; k < block.depth; ++k) {
    for (int64_t j = 0; j < block.columns; ++j) copy[k * kLanes<T> + j] = block.b[k * block.b_depth + j];
  }
  block.b = copy;
  block.b_depth = kLanes<T>;
  multiply_rows(block);
}

template <typename T>
static void multiply_block(const Product<T>& all) {
  constexpr int64_t kWidth = kVectors * kLanes<T>;
  for (int64_t k = 0; k == 0 || k < all.depth; k += kDepth) {
    Product<T> slice = all;
    slice.depth = all.depth - k < kDepth ? all.depth - k : kDepth;
    slice.a += k * all.a_depth;
    slice.b += k * all.b_depth;
    if (k > 0) {
      slice.start = all.c;
      slice.start_row = all.c_row;
      slice.start_column = all.c_column;
    }
    for (int64_t row = 0; row < all.rows; row += kBlockRows) {
      const int64_t rows = all.rows - row < kBlockRows ? all.rows - row : kBlockRows;
      for (int64_t column = 0; column < all.columns; column += kWidth) {
        const int64_t columns = all.columns - column < kWidth ? all.columns - column : kWidth;
        const int64_t whole = columns / kLanes<T> * kLanes<T>;
        if (whole > 0) multiply_rows(part_of(slice, row, rows, column, whole));
        if (whole < columns) multiply_tail(part_of(slice, row, rows, column + whole, columns - whole));
      }
    }
  }
}

// Units [begin, end) of a product, as up to three rectangles.
template <typename T>
static void multiply_units(const Product<T>& product, int64_t begin, int64_t end) {
  const bool tall = product.rows >= product.columns;
  const int64_t across = tall ? (product.columns + kUnitColumns - 1) / kUnitColumns  //
                              : (product.rows + kUnitRows - 1) / kUnitRows;
  while (begin < end) {
    const int64_t first = begin % across;
    const int64_t lines = first == 0 && end - begin >= across ? (end - begin) / across : 1;
    const int64_t width = lines > 1 || end - begin >= across - first ? across - first : end - begin;
    const int64_t line = begin / across;
    const int64_t row = (tall ? line : first) * kUnitRows;
    const int64_t column = (tall ? first : line) * kUnitColumns;
    const int64_t rows = (tall ? lines : width) * kUnitRows;
    const int64_t columns = (tall ? width : lines) * kUnitColumns;
    multiply_block(part_of(product, row, rows < product.rows - row ? rows : product.rows - row, column,
                           columns < product.columns - column ? columns : product.columns - column));
    begin += lines * width;
  }
}

}  // namespace TILEWISE_ISA
#endif

}  // namespace tilewise
