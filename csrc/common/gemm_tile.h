// Matrix products on the CPU, C = start + A B. A tile of C stays in registers while the depth passes by:
//
//   for k:  C[i, 0:n] += A[i, k] * B[k, 0:n]      6 rows, n = 1..kVectors vectors; A is broadcast, B is loaded
//
// Factors are streamed where they lie, for in products of few rows or columns packing takes as long as multiplying;
// see kPacks. Blocks of kDepth x (kBlockRows of A, the columns packed of B) stay in the second-level cache. Every
// element of C sums its products in the same order whatever the number of threads.
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

template <typename T>
struct GemmKernels {
  void (*multiply)(const Product<T>&, int64_t begin, int64_t end);  // units [begin, end)
};
TILEWISE_DECLARE_KERNELS(ForTypes<GemmKernels>, gemm_kernels)

#if defined(TILEWISE_ISA)
namespace TILEWISE_ISA {

constexpr int kVectors = kRegisters >= 32 ? 4 : 2;  // 6 x 4 of 32 registers hold sums, or 6 x 2 of 16
template <typename T>
constexpr int64_t kWidth = kVectors * kLanes<T>;

// A tile reads kWidth values of every row of B. Four cache lines are streamed; one line or half of one is not, and
// where the rows are 2^n apart it is also evicted before the next tile of rows reads it: then columns of B are packed.
constexpr bool kPacks = kVectors * kVectorBytes < 256;
template <typename T>
constexpr int64_t kDepth = kPacks ? 2048 / sizeof(T) : 512;
constexpr int64_t kBlockRows = 96;
template <typename T>
constexpr int64_t kPackedColumns = 512 / sizeof(T);  // of kDepth rows, or as many more of fewer rows: 256 KiB
constexpr int64_t kReuse = 24;                       // rows and depth from which packing takes less time than it saves

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
  if (!vectors) {
    for (int64_t j = 0; j < product.columns; ++j) __builtin_prefetch(product.c + j * product.c_column, 1);
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
  T tile[kRows][kCount * kLanes<T>];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) store_vector(sums[i][j], &tile[i][j * kLanes<T>]);
  }
  for (int64_t j = 0; j < product.columns; ++j) {
    for (int i = 0; i < kRows; ++i) {
      T sum = tile[i][j];
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

// Columns [begin, end) of B as panels of kWidth, one after the other; the last one in whole vectors, with zeros behind
// its columns. Returns the width of the first panel.
template <typename T>
static int64_t pack_columns(const Product<T>& product, int64_t begin, int64_t end, T* copy) {
  const int64_t rest = (end - begin) % kWidth<T>;
  const int64_t width = end - begin < kWidth<T> ? (rest + kLanes<T> - 1) / kLanes<T> * kLanes<T> : kWidth<T>;
  for (int64_t k = 0; k < product.depth; ++k) {
    const T* from = product.b + k * product.b_depth + begin;
    const T* const last = from + (end - begin - rest);
    T* to = copy + k * width;
    for (; from < last; from += kWidth<T>, to += product.depth * kWidth<T>) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) store_vector(load_vector(from + j * kLanes<T>), to + j * kLanes<T>);
    }
    for (int64_t j = 0; j < rest; ++j) to[j] = from[j];
    for (int64_t j = rest; rest > 0 && j < width; ++j) to[j] = T(0);
  }
  return width;
}

// The rows of a tile side by side, its tiles one after the other.
template <typename T>
static void pack_rows(Product<T>& block, T* copy) {
  for (int64_t k = 0; k < block.depth; ++k) {
    const T* from = block.a + k * block.a_depth;
    T* to = copy + k * kUnitRows;
    int64_t row = 0;
    for (; row + kUnitRows <= block.rows; row += kUnitRows, to += block.depth * kUnitRows) {
#pragma GCC unroll 6
      for (int64_t i = 0; i < kUnitRows; ++i) to[i] = from[(row + i) * block.a_row];
    }
    for (int64_t i = row; i < block.rows; ++i) to[i - row] = from[i * block.a_row];
  }
  block.a = copy;
  block.a_row = 1;
  block.a_depth = kUnitRows;
}

// Columns of B that do not fill a vector are packed too: memory ends where B ends. Not inlined, so that products that
// pack little have no frame of all copies.
template <typename T, bool kPacked>
[[gnu::noinline]] static void multiply_group(const Product<T>& group) {
  static constexpr auto kTiles = tile_table<T>(std::make_integer_sequence<int, kUnitRows * kVectors>{});
  alignas(kVectorBytes) T b_copy[kDepth<T> * (kPacked ? kPackedColumns<T> : kLanes<T>)];
  alignas(kVectorBytes) T a_copy[kPacked ? kDepth<T> * kBlockRows : 1];
  const int64_t whole = kPacked ? 0 : group.columns / kLanes<T> * kLanes<T>;
  const int64_t width = whole < group.columns ? pack_columns(group, whole, group.columns, b_copy) : 0;
  for (int64_t row = 0; row < group.rows; row += kBlockRows) {
    const int64_t rows = group.rows - row < kBlockRows ? group.rows - row : kBlockRows;
    Product<T> block = part_of(group, row, rows, 0, group.columns);
    int64_t tile_step = kUnitRows * block.a_row;
    if (kPacked && block.a_depth > kBlockRows) {
      pack_rows(block, a_copy);
      tile_step = kUnitRows * block.depth;
    }
    for (int64_t column = 0, end = 0; column < group.columns; column = end) {
      const int64_t most = column < whole ? whole : group.columns;
      end = most - column < kWidth<T> ? most : column + kWidth<T>;
      Product<T> panel = part_of(block, 0, rows, column, end - column);
      if (column >= whole) {
        panel.b = b_copy + (column - whole) * group.depth;
        panel.b_depth = width;
      }
      const int64_t vectors = (panel.columns + kLanes<T> - 1) / kLanes<T>;
      for (int64_t i = 0; i < rows; i += kUnitRows) {
        Product<T> tile = part_of(panel, i, rows - i < kUnitRows ? rows - i : kUnitRows, 0, panel.columns);
        tile.a = block.a + i / kUnitRows * tile_step;
        kTiles[(tile.rows - 1) * kVectors + vectors - 1](tile);
      }
    }
  }
}

template <typename T>
static void multiply_slice(const Product<T>& slice) {
  if constexpr (kPacks) {
    if (slice.rows >= kReuse && slice.depth >= kReuse && slice.b_depth > kWidth<T>) {
      const int64_t most = kDepth<T> * kPackedColumns<T> / (slice.depth * kWidth<T>)*kWidth<T>;
      for (int64_t column = 0; column < slice.columns; column += most) {
        const int64_t columns = slice.columns - column < most ? slice.columns - column : most;
        multiply_group<T, true>(part_of(slice, 0, slice.rows, column, columns));
      }
      return;
    }
  }
  multiply_group<T, false>(slice);
}

template <typename T>
static void multiply_block(const Product<T>& all) {
  for (int64_t k = 0; k == 0 || k < all.depth; k += kDepth<T>) {
    Product<T> slice = all;
    slice.depth = all.depth - k < kDepth<T> ? all.depth - k : kDepth<T>;
    slice.a += k * all.a_depth;
    slice.b += k * all.b_depth;
    if (k > 0) {
      slice.start = all.c;
      slice.start_row = all.c_row;
      slice.start_column = all.c_column;
    }
    multiply_slice(slice);
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
