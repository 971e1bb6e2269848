// simplex_topk, and sparse_ot with every method; columns alone are those of a router.
#include <algorithm>
#include <array>

#include "race.h"

namespace race {
namespace {

struct Size {
  int64_t batch, rows, columns, k;
};
// The last but one is gathered in parts.
constexpr std::array kSizes = {
    Size{0, 20, 7, 3},   Size{1, 1, 1, 1},      Size{2, 20, 7, 10},     Size{2, 70, 33, 35},
    Size{1, 40, 33, 40}, Size{2, 1100, 2, 600}, Size{1, 26000, 2, 900}, Size{1, 26000, 1, 13000},
};
constexpr int64_t kLong = 2000;  // rows, which take a while
constexpr int64_t kMethods = 3, kDual = 1, kAdam = 2;

std::string named(const Size& size, int64_t method) {
  return std::to_string(size.batch) + " x " + std::to_string(size.rows) + " x " + std::to_string(size.columns) +
         ", method " + std::to_string(method);
}

SparseCall sparse_call(Memory& memory, const Size& size, int64_t method) {
  const auto [batch, rows, columns, k] = size;
  SparseCall call{.batch = batch, .rows = rows, .columns = columns, .k = k, .method = method};
  call.gamma = 0.5;
  call.costs = memory.numbers(batch * rows * columns, 0.0f, 1.0f);
  call.alpha = memory.filled(batch * rows, 0.0f);
  call.values = memory.output(batch * columns * k);
  call.indices = memory.integer_output(batch * columns * k);
  call.beta = memory.output(batch * columns);
  call.margin = memory.output(batch * columns);
  return call;
}

}  // namespace

void simplex_topk_calls() {
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{0, 40}, {1, 1}, {9, 40}, {9, 200}, {2, 1500}, {1, 26000}}) {
    Memory memory;
    const int64_t k = std::min<int64_t>(columns, 5);
    const float* x = memory.numbers(rows * columns);
    const float* grad = memory.numbers(rows * columns);
    float* p = memory.output(rows * columns);
    float* out = memory.output(rows * columns);
    call(std::to_string(rows) + " x " + std::to_string(columns), memory, [&] {
      const char* error = simplex_topk(x, nullptr, p, rows, columns, k, 1.0);
      return error != nullptr ? error : simplex_topk(p, grad, out, rows, columns, k, 1.0);
    });
  }
}

void sparse_ot_calls() {
  for (const Size& size : kSizes) {
    for (int64_t method = size.rows > kLong ? kAdam : 0; method < kMethods; ++method) {
      Memory memory;
      SparseCall problem = sparse_call(memory, size, method);
      problem.a = memory.shares(size.batch, size.rows);
      problem.b = memory.shares(size.batch, size.columns);
      problem.max_iter = size.rows > kLong ? 2 : 4;
      problem.tol = 1e-6;
      problem.rate = 0.01;
      if (method == kDual) std::fill_n(problem.beta, size.batch * size.columns, 0.0f);  // where to start
      problem.value = memory.output(size.batch);
      problem.row_error = memory.output(size.batch);
      problem.column_error = memory.output(size.batch);
      problem.n_iter = memory.integer_output(size.batch);
      call(named(size, method), memory, [&] { return sparse_transport(problem); });
    }
  }
}

void router_calls() {
  for (const Size& size : kSizes) {
    for (int64_t method = 0; method <= kDual; ++method) {
      Memory memory;
      SparseCall problem = sparse_call(memory, size, method);
      problem.level = method == kDual ? memory.numbers(size.batch * size.columns, 0.2f, 0.7f)
                                      : memory.shares(size.batch, size.columns);
      problem.row_sums = memory.output(size.batch * size.rows);
      call(named(size, method), memory, [&] { return sparse_transport(problem); });
    }
  }
}

}  // namespace race
