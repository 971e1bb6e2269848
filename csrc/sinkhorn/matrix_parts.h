// How half a step over a matrix is shared among the blocks of a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sinkhorn/sinkhorn.h"

namespace tilewise {

// The sum of 2^score along a row, or along a part of it, as total 2^top.
struct RowSum {
  float top;
  float total;
};

// A block has a strip of rows and a part of the columns. Its threads have neighbours in memory side by side: along a
// row, or where these lie in a column across the rows.
struct MatrixParts {
  static constexpr int kAlongRows = 32, kAcrossRows = 128;        // of a strip
  static constexpr int kAlongColumns = 128, kAcrossColumns = 32;  // that a block has at a time
  static constexpr int64_t kMostColumns = 2048;                   // whose offsets are in shared memory

  bool across = false;
  int64_t strips = 0;
  int64_t columns = 0;  // of a part
  int64_t parts = 0;

  static MatrixParts of(const Pairs<float>& pairs) {
    constexpr int64_t kEnoughBlocks = 2112;  // four turns of all that 132 multiprocessors hold
    MatrixParts result;
    result.across = pairs.row_stride < pairs.column_stride;
    const int64_t rows = result.across ? kAcrossRows : kAlongRows,
                  step = result.across ? kAcrossColumns : kAlongColumns;
    result.strips = quotient(pairs.rows, rows);
    const int64_t wanted = quotient(kEnoughBlocks, std::max<int64_t>(pairs.batch, 1) * result.strips);
    const int64_t columns = quotient(quotient(pairs.columns, wanted), step) * step, least = 4 * step;
    result.columns = std::clamp(columns, least, kMostColumns);
    result.parts = quotient(pairs.columns, result.columns);
    return result;
  }

  int64_t sums(const Pairs<float>& pairs) const { return parts > 1 ? pairs.batch * parts * pairs.rows : 0; }

 private:
  static int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

}  // namespace tilewise
