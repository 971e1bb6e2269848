// wta_crs: norms, samples by every method, and the rows that were drawn.
#include <algorithm>
#include <array>

#include "race.h"
#include "wta_crs/wta_crs.h"

namespace race {
namespace {

using tilewise::Dtype;

constexpr int64_t kBatch = 2, kMethods = 3;

void norms_and_gather(int64_t rows, int64_t columns, int64_t k, Dtype dtype, bool transposed) {
  Memory memory;
  RowsCall of_rows{.batch = kBatch, .rows = rows, .columns = columns, .k = k, .dtype = static_cast<int64_t>(dtype)};
  of_rows.data = memory.numbers(dtype, kBatch * rows * columns);
  of_rows.batch_stride = rows * columns;
  of_rows.row_stride = transposed ? 1 : columns;
  of_rows.column_stride = transposed ? rows : 1;
  const std::string shape = std::to_string(rows) + " x " + std::to_string(columns);
  of_rows.out = memory.output(kBatch * rows);
  call("norms of " + shape, memory, [&] { return wta_crs_norms(of_rows); });
  if (rows > 0) of_rows.indices = memory.integers_32(kBatch * k, static_cast<int32_t>(rows));
  of_rows.scales = memory.numbers(kBatch * k, 0.5f, 5.0f);
  of_rows.out = memory.output(dtype, kBatch * k * columns);
  call("gather of " + shape, memory, [&] { return wta_crs_gather(of_rows); });
}

void sample(int64_t batch, int64_t rows, int64_t k, int64_t method, bool heavy) {
  Memory memory;
  RowsCall of_rows{.batch = batch, .rows = rows, .k = k};
  of_rows.indices = memory.integer_output_32(batch * k);
  of_rows.scales = memory.output(batch * k);
  float* x_norms = memory.numbers(batch * rows, 0.1f, 1.0f);
  if (heavy && batch > 0) x_norms[rows / 2] = 1e3f;
  const float* y_norms = heavy ? nullptr : memory.numbers(batch * rows, 0.1f, 1.0f);
  const int64_t* seed = memory.integers(1, 1 << 30);
  const int64_t mix = (int64_t{1} << tilewise::kMixBits) / 20;
  call("sample " + std::to_string(k) + " of " + std::to_string(rows) + ", method " + std::to_string(method), memory,
       [&] { return wta_crs_sample(of_rows, x_norms, y_norms, seed, method, mix); });
}

}  // namespace

void wta_crs_calls() {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
    for (const int64_t columns : {0, 1, 33, 256, 1500}) {
      norms_and_gather(9, columns, 4, dtype, false);
      norms_and_gather(9, columns, 4, dtype, true);
    }
    norms_and_gather(9, 33, 0, dtype, false);
    norms_and_gather(0, 33, 0, dtype, false);
  }
  for (int64_t method = 0; method < kMethods; ++method) {
    sample(0, 10, 3, method, false);
    for (const int64_t rows : {1, 100, 700}) {
      for (const int64_t k : {(rows + 9) / 10, rows}) {
        sample(kBatch, rows, k, method, false);
        sample(kBatch, rows, k, method, true);
      }
    }
    sample(kBatch, 2100, 50, method, true);   // 512 threads
    sample(kBatch, 9000, 900, method, true);  // many blocks
  }
}

}  // namespace race
