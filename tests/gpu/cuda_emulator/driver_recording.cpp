// Recordings (recording.h), and what the binding files do around the launches: sizes of chunks, reductions.
#include "common/launch.cuh"
#include "linear_cross_entropy/chunks.h"
#include "pairwise/chunks.h"
#include "pairwise/pairwise.h"
#include "rows/rows.h"

namespace {

constexpr bool kOnGpu = true;

}  // namespace

extern "C" void begin_recording() { emulator::recording = {.on = true}; }

// Where the launches are, how many, and the bytes of scratch memory; they stay until the next recording begins.
extern "C" int64_t end_recording(const emulator::Launch** launches, int64_t* scratch_bytes) {
  emulator::recording.on = false;
  *launches = emulator::recording.launches.data();
  *scratch_bytes = emulator::recording.scratch_bytes;
  return static_cast<int64_t>(emulator::recording.launches.size());
}

extern "C" const char* row_reduction(int64_t rows) {
  return tilewise::pairwise_reduction_cuda({.rows = rows}, nullptr);
}

extern "C" int64_t pair_rows(int64_t rows, int64_t columns) {
  return tilewise::pair_rows_at_a_time(rows, columns, sizeof(float), 0, kOnGpu);
}

extern "C" int64_t pair_gradient_rows(int64_t rows_at_a_time, int64_t columns, int64_t item_bytes) {
  return tilewise::pair_gradient_rows(rows_at_a_time, columns, item_bytes, 0);
}

extern "C" int64_t row_parts(int64_t rows, int64_t columns) { return tilewise::row_parts(rows, columns); }

extern "C" int64_t logit_rows(int64_t rows, int64_t classes, int64_t item_bytes) {
  return tilewise::logits_at_a_time(rows, classes * item_bytes, tilewise::kMinRows, 0, kOnGpu);
}

extern "C" int64_t logit_classes(int64_t rows, int64_t classes, int64_t item_bytes) {
  return tilewise::logits_at_a_time(classes, rows * item_bytes, tilewise::kMinClasses, 0, kOnGpu);
}
