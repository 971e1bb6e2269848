// The launches of one call on a GPU, in order, and the scratch memory between them (host only, raw pointers).
//
// An evaluation is two launches: a cut of every column, then the sums of the rows, each from the whole matrix, so that
// nothing is added in the order of arrival. Nobody waits for the device: all max_iter evaluations are launched, and
// those of a problem that has ended return at once.
#pragma once

#include "sparse_ot/sparse_ot.h"

namespace tilewise {

// Of one column: its cut (simplex_topk/project.cuh) and the sums over its entries.
struct SparseCut {
  float level;
  float equal;
  float top;
  float below;
  int64_t last;
  double squares;
  double mass;
};

// The state of the search; where it has ended (`numbers`) kernels do nothing.
struct SparseSearch {
  SparseOtCall<float> call;  // columns with alpha and level where the function is evaluated
  SparseCut* cuts = nullptr;
  float* vectors = nullptr;  // (batch, kVectors, size) of Lbfgs; of Adam (batch, 2, size)
  double* pairs = nullptr;   // (batch, 2 kHistory)
  LbfgsNumbers* numbers = nullptr;
  float first_left = 0;  // of Adam: 1 - 0.9^t; 0: no step is taken
  float second_left = 0;
};

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
    return rounded<SparseCut>(call.batch * call.columns);
  }
  static int64_t solve_bytes(const SparseOtCall<float>& call) {
    const int64_t batch = call.columns.batch;
    return columns_bytes(call.columns) + rounded<float>(batch * vectors(call) * variables(call)) +
           rounded<double>(batch * 2 * kHistory) + rounded<LbfgsNumbers>(batch) +
           rounded<float>(batch * call.columns.rows);
  }

  const char* columns(const SparseColumns<float>& call) {
    SparseSearch search{.call = {.columns = call}};
    search.cuts = take<SparseCut>(call.batch * call.columns);
    run(sparse_cut_cuda(search, stream_));
    run(sparse_rows_cuda(search, stream_));
    run(sparse_lists_cuda(search, stream_));
    return error_;
  }

  const char* solve(const SparseOtCall<float>& call) {
    const int64_t batch = call.columns.batch, rows = call.columns.rows, size = variables(call);
    const bool adam = call.method == SparseMethod::kAdam, dual = call.method == SparseMethod::kDual;
    SparseSearch search{.call = call};
    SparseColumns<float>& at = search.call.columns;
    search.cuts = take<SparseCut>(batch * at.columns);
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
    double first = 1.0, second = 1.0;
    for (int64_t t = 0; t < call.max_iter && error_ == nullptr; ++t) {
      search.first_left = adam ? static_cast<float>(1.0 - (first *= 0.9)) : 0.0f;
      search.second_left = adam ? static_cast<float>(1.0 - (second *= 0.999)) : 0.0f;
      run(sparse_cut_cuda(search, stream_));
      run(sparse_rows_cuda(search, stream_));
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
    run(sparse_cut_cuda(last, stream_));
    run(sparse_rows_cuda(last, stream_));
    run(sparse_lists_cuda(last, stream_));
    last.numbers = search.numbers;
    run(sparse_finish_cuda(last, row_sums, stream_));
    return error_;
  }

 private:
  static int64_t vectors(const SparseOtCall<float>& call) {
    return call.method == SparseMethod::kAdam ? 2 : Lbfgs<float>::kVectors;
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
