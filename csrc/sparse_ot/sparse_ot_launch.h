// The launches of one call on a GPU, in order, and the scratch memory between them (host only, raw pointers).
//
// An evaluation is two launches: a cut of every column, then the sums of the rows, each from the whole matrix, so that
// nothing is added in the order of arrival. A column that one block would read for long is gathered before by many:
// what is above a hint, which lies a little below the k-th score of the last evaluation, and at first of a sample. With
// Adam, whose potentials of a row need that row alone, the second launch gathers for the next evaluation. Where the
// hint is too high or too low the cut takes longer and is the same. Nobody waits for the device: all max_iter
// evaluations are launched, and those of a problem that has ended return at once.
#pragma once

#include "simplex_topk/simplex_topk.h"
#include "sparse_ot/sparse_ot.h"

namespace tilewise {

// Of one column: its cut (simplex_topk/project.cuh) and the sums over its entries. What every row reads is one vector.
struct SparseCut {
  struct alignas(16) Levels {
    float level;
    float equal;
    float top;
    float below;
  };
  Levels levels;
  int64_t last;
  double squares;
  double mass;
  float hint;
};

constexpr int64_t kPart = 128;  // rows of a column that a warp gathers

template <typename T>
TILEWISE_FN bool is_gathered(const SparseColumns<T>& call) {
  return call.rows > kRoom && 2 * call.k <= kRoom;
}

template <typename T>
TILEWISE_FN int64_t parts_of(const SparseColumns<T>& call) {
  return (call.rows + kPart - 1) / kPart;
}

// The state of the search; where it has ended (`numbers`) kernels do nothing.
struct SparseSearch {
  SparseOtCall<float> call;  // columns with alpha and level where the function is evaluated
  SparseCut* cuts = nullptr;
  float* gathered = nullptr;   // (batch, columns, parts, kPart), or null: the scores of a part, in order
  uint32_t* counts = nullptr;  // (batch, columns, parts)
  float* vectors = nullptr;    // (batch, kVectors, size) of Lbfgs; of Adam (batch, 2, size)
  double* pairs = nullptr;     // (batch, 2 kHistory)
  LbfgsNumbers* numbers = nullptr;
  float first_left = 0;  // of Adam: 1 - 0.9^t; 0: no step is taken
  float second_left = 0;
};

TILEWISE_FN bool ended(const SparseSearch& search, int64_t problem) {
  return search.numbers != nullptr && !search.numbers[problem].going;
}

const char* sparse_guess_cuda(const SparseSearch& search, void* stream);
const char* sparse_gather_cuda(const SparseSearch& search, void* stream);
const char* sparse_cut_cuda(const SparseSearch& search, void* stream);
const char* sparse_rows_cuda(const SparseSearch& search, void* stream);
const char* sparse_lists_cuda(const SparseSearch& search, void* stream);
const char* sparse_begin_cuda(const SparseSearch& search, void* stream);
const char* sparse_step_cuda(const SparseSearch& search, void* stream);
const char* sparse_accept_cuda(const SparseSearch& search, void* stream);
const char* sparse_finish_cuda(const SparseSearch& search, float* row_sums, void* stream);

class SparseOtLaunches {
 public:
  SparseOtLaunches(void* scratch, void* stream) : next_(static_cast<char*>(scratch)), stream_(stream) {}

  static int64_t columns_bytes(const SparseColumns<float>& call) {
    const int64_t parts = is_gathered(call) ? call.batch * call.columns * parts_of(call) : 0;
    return rounded<SparseCut>(call.batch * call.columns) + rounded<float>(parts * kPart) + rounded<uint32_t>(parts);
  }
  static int64_t solve_bytes(const SparseOtCall<float>& call) {
    const int64_t batch = call.columns.batch;
    return columns_bytes(call.columns) + rounded<float>(batch * vectors(call) * variables(call)) +
           rounded<double>(batch * 2 * kHistory) + rounded<LbfgsNumbers>(batch) +
           rounded<float>(batch * call.columns.rows);
  }

  const char* columns(const SparseColumns<float>& call) {
    SparseSearch search{.call = {.columns = call}};
    take_columns(search);
    guess(search);
    evaluate(search, true);
    run(sparse_lists_cuda(search, stream_));
    return error_;
  }

  const char* solve(const SparseOtCall<float>& call) {
    const int64_t batch = call.columns.batch, rows = call.columns.rows, size = variables(call);
    const bool adam = call.method == SparseMethod::kAdam, dual = call.method == SparseMethod::kDual;
    SparseSearch search{.call = call};
    SparseColumns<float>& at = search.call.columns;
    take_columns(search);
    search.vectors = take<float>(batch * vectors(call) * size);
    search.pairs = take<double>(batch * 2 * kHistory);
    search.numbers = take<LbfgsNumbers>(batch);
    float* row_sums = take<float>(batch * rows);
    run(sparse_begin_cuda(search, stream_));

    // The function is evaluated at vector 2 of the search, its gradient is vector 3; Adam's is alpha itself.
    const int64_t all = vectors(call) * size;
    at.alpha = adam ? call.alpha : search.vectors + 2 * size;
    at.alpha_stride = adam ? rows : all;
    at.level = dual ? at.alpha + rows : call.b;
    at.level_stride = dual ? all : at.columns;
    at.row_sums = adam ? row_sums : search.vectors + 3 * size;
    at.row_stride = adam ? rows : all;
    guess(search);
    double first = 1.0, second = 1.0;
    for (int64_t t = 0; t < call.max_iter && error_ == nullptr; ++t) {
      search.first_left = adam ? static_cast<float>(1.0 - (first *= 0.9)) : 0.0f;
      search.second_left = adam ? static_cast<float>(1.0 - (second *= 0.999)) : 0.0f;
      evaluate(search, t == 0 || !adam);
      if (!adam) run(sparse_step_cuda(search, stream_));
    }
    search.first_left = 0.0f;
    if (!adam) run(sparse_accept_cuda(search, stream_));

    SparseSearch last = search;  // whatever has ended
    last.numbers = nullptr;
    last.call.columns.alpha = call.alpha;
    last.call.columns.alpha_stride = rows;
    last.call.columns.level = dual ? call.columns.beta : call.b;
    last.call.columns.level_stride = at.columns;
    last.call.columns.row_sums = row_sums;
    last.call.columns.row_stride = rows;
    evaluate(last, !adam);
    run(sparse_lists_cuda(last, stream_));
    last.numbers = search.numbers;
    run(sparse_finish_cuda(last, row_sums, stream_));
    return error_;
  }

 private:
  static int64_t vectors(const SparseOtCall<float>& call) {
    return call.method == SparseMethod::kAdam ? 2 : Lbfgs<float>::kVectors;
  }

  void take_columns(SparseSearch& search) {
    const SparseColumns<float>& call = search.call.columns;
    search.cuts = take<SparseCut>(call.batch * call.columns);
    if (!is_gathered(call)) return;
    const int64_t parts = call.batch * call.columns * parts_of(call);
    search.gathered = take<float>(parts * kPart);
    search.counts = take<uint32_t>(parts);
  }

  void guess(const SparseSearch& search) {
    if (search.gathered != nullptr) run(sparse_guess_cuda(search, stream_));
  }

  void evaluate(const SparseSearch& search, bool gathers) {
    if (gathers && search.gathered != nullptr) run(sparse_gather_cuda(search, stream_));
    run(sparse_cut_cuda(search, stream_));
    run(sparse_rows_cuda(search, stream_));
  }

  template <typename T>
  static int64_t rounded(int64_t count) {
    constexpr int64_t kBoundary = 16;
    return (count * static_cast<int64_t>(sizeof(T)) + kBoundary - 1) / kBoundary * kBoundary;
  }

  template <typename T>
  T* take(int64_t count) {
    T* begin = reinterpret_cast<T*>(next_);
    next_ += rounded<T>(count);
    return begin;
  }

  void run(const char* error) {
    if (error_ == nullptr) error_ = error;
  }

  char* next_;
  void* stream_;
  const char* error_ = nullptr;
};

}  // namespace tilewise
