// The launches of a sample on a GPU, in order, and the scratch memory between them (host only, raw pointers).
//
// A warp has a part of the rows. Few rows are one launch, of a block for each problem. Many rows are shared among
// blocks, in three: the largest size of each block; then weights, after which the last block of a problem to end finds
// the certain rows and says what is before each part; then the rows go to their places. What is drawn with replacement
// is drawn last, from the running sums.
#pragma once

#include "common/scratch.h"
#include "wta_crs/wta_crs.h"

namespace tilewise {

constexpr int64_t kMostParts = 1024;  // of a problem: one for each lane of the block that shares out the places
constexpr int64_t kLanes = 32;

TILEWISE_FN int64_t part_rows(int64_t rows) {
  constexpr int64_t kTurn = kMostParts * kLanes;
  return (rows + kTurn - 1) / kTurn * kLanes;
}
TILEWISE_FN int64_t parts_of(int64_t rows) { return (rows + part_rows(rows) - 1) / part_rows(rows); }

// Sums over the rows of a part, and the most that one of them weighs of its own.
struct RowPart {
  int64_t units;
  int64_t own;
  uint32_t heaviest;
};

struct SampleWork {
  RowSample call;
  double* largest = nullptr;    // (batch, blocks of the first launch)
  RowPart* parts = nullptr;     // (batch, parts)
  Before* before = nullptr;     // likewise
  Shares* shares = nullptr;     // (batch,)
  unsigned* tickets = nullptr;  // likewise
};

const char* wta_crs_sample_cuda(const SampleWork& work, void* stream);
const char* wta_crs_sizes_cuda(const SampleWork& work, void* stream);
const char* wta_crs_weigh_cuda(const SampleWork& work, void* stream);
const char* wta_crs_place_cuda(const SampleWork& work, void* stream);
const char* wta_crs_draw_cuda(const SampleWork& work, void* stream);

class WtaCrsLaunches {
 public:
  WtaCrsLaunches(const RowSample& call, void* scratch) : work_{.call = call}, scratch_(scratch) {
    const int64_t parts = call.batch * parts_of(call.rows);
    work_.call.own = scratch_.take<uint32_t>(call.batch * call.rows);
    if (call.method != SampleMethod::kSystematic) work_.call.sums = scratch_.take<int64_t>(call.batch * call.rows);
    work_.parts = scratch_.take<RowPart>(parts);
    work_.before = scratch_.take<Before>(parts);
    work_.largest = scratch_.take<double>(parts);
    work_.shares = scratch_.take<Shares>(call.batch);
    work_.tickets = scratch_.take<unsigned>(call.batch);
  }

  static int64_t bytes(const RowSample& call) { return WtaCrsLaunches(call, nullptr).scratch_.bytes(); }

  const char* sample(void* stream) const {
    constexpr int64_t kFew = 4096;  // rows, with which one block ends before two more launches would have begun
    if (work_.call.rows <= kFew) return wta_crs_sample_cuda(work_, stream);
    for (const auto launch : {wta_crs_sizes_cuda, wta_crs_weigh_cuda, wta_crs_place_cuda})
      if (const char* error = launch(work_, stream); error != nullptr) return error;
    return work_.call.sums == nullptr ? nullptr : wta_crs_draw_cuda(work_, stream);
  }

 private:
  SampleWork work_;
  Scratch scratch_;
};

}  // namespace tilewise
