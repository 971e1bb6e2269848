// How many rows of similarities are formed at a time (host only).
#pragma once

#include <algorithm>
#include <cstdint>

namespace tilewise {

// On the CPU the similarities stay in the cache between the product and the programs; a GPU wants large products. Sizes
// alone decide, so that the same call gives the same bits whatever memory is free.
constexpr int64_t pair_chunk_bytes(bool on_gpu) { return int64_t{on_gpu ? 128 : 4} << 20; }

constexpr int64_t kLeastPairRows = 96;

// Of `rows`, in parts of about equal size; chunk_bytes 0: as above.
inline int64_t pair_rows_at_a_time(int64_t rows, int64_t columns, int64_t item_bytes, int64_t chunk_bytes,
                                   bool on_gpu) {
  const int64_t least = chunk_bytes == 0 ? kLeastPairRows : 1;
  const int64_t bytes = chunk_bytes == 0 ? pair_chunk_bytes(on_gpu) : chunk_bytes;
  const int64_t row = std::max<int64_t>(1, columns) * item_bytes;
  const int64_t most = std::min(std::max(bytes / row, least), std::max<int64_t>(1, rows));
  const int64_t parts = std::max<int64_t>(1, (rows + most - 1) / most);
  return (rows + parts - 1) / parts;
}

// Rows whose 16-bit gradients a GPU keeps, in whole chunks, for products together: each of these reads and writes a sum
// as large as y, which takes as long as a product of a thousand rows. They have up to four times the bytes of a chunk.
constexpr int64_t kMostPairGradients = 4096;

inline int64_t pair_gradient_rows(int64_t rows_at_a_time, int64_t columns, int64_t item_bytes, int64_t chunk_bytes) {
  const int64_t bytes = 4 * (chunk_bytes == 0 ? pair_chunk_bytes(true) : chunk_bytes);
  const int64_t most = std::min(kMostPairGradients, bytes / (std::max<int64_t>(1, columns) * item_bytes));
  return std::max<int64_t>(1, most / rows_at_a_time) * rows_at_a_time;
}

}  // namespace tilewise
