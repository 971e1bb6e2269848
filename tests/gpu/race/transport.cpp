// sinkhorn: problems of a few lanes, of a warp, and of tiles, with every cost.
#include <array>

#include "race.h"
#include "sinkhorn/sinkhorn.h"

namespace race {
namespace {

struct Size {
  int64_t batch, rows, columns, features = 40;
};
constexpr std::array kSizes = {
    Size{0, 3, 4},       Size{1, 1, 1},      Size{3, 3, 4},    Size{5, 8, 5},       Size{2, 9, 17},
    Size{2, 40, 60},     Size{1, 64, 64},    Size{0, 70, 90},  Size{2, 70, 130},    Size{1, 65, 1},
    Size{1, 70, 3},      Size{1, 65, 66, 0}, Size{2, 3, 4, 0}, Size{2, 70, 130, 3}, Size{1, 65, 66, 70},
    Size{1, 34, 520, 1}, Size{300, 4, 4, 2},
};
constexpr int64_t kCosts = 3;

std::string named(const char* what, const Size& size, int64_t cost, const char* option = "") {
  return std::string(what) + " of " + std::to_string(size.batch) + " x " + std::to_string(size.rows) + " x " +
         std::to_string(size.columns) + " of " + std::to_string(size.features) + " features, cost " +
         std::to_string(cost) + option;
}

TransportCall transport_call(Memory& memory, const Size& size, int64_t cost) {
  const auto [batch, rows, columns, features] = size;
  TransportCall call{.cost = cost, .batch = batch, .rows = rows, .columns = columns, .features = features};
  if (cost == 0) {
    call.matrix = memory.numbers(batch * rows * columns, 0.0f, 1.0f);
    call.batch_stride = rows * columns;
    call.row_stride = columns;
    call.column_stride = 1;
  } else {
    call.x = memory.numbers(batch * rows * features, 0.0f, 0.2f);
    call.y = memory.numbers(batch * columns * features, 0.0f, 0.2f);
  }
  call.a = memory.shares(batch, rows);
  call.b = memory.shares(batch, columns);
  call.epsilon = memory.filled(batch, 0.2f);
  return call;
}

void take_potentials(Memory& memory, TransportCall& call) {
  call.f = memory.numbers(call.batch * call.rows, -0.1f, 0.1f);
  call.g = memory.numbers(call.batch * call.columns, -0.1f, 0.1f);
}

void solve(const Size& size, int64_t cost, bool falls, bool penalties, bool symmetric) {
  Memory memory;
  TransportCall problem = transport_call(memory, size, cost);
  take_potentials(memory, problem);
  problem.scaling = 0.5;
  problem.max_iter = 3;
  problem.tol = 1e-9;
  if (falls) problem.start = memory.filled(size.batch, 1.0f);
  if (penalties) problem.rho_a = problem.rho_b = 0.7;
  if (symmetric) {
    problem.symmetric = 1;
    problem.y = problem.x;
    problem.b = problem.a;
  }
  problem.value = memory.output(size.batch);
  problem.error = memory.output(size.batch);
  problem.n_iter = memory.integer_output(size.batch);
  const char* option = symmetric ? ", symmetric" : penalties ? ", penalties" : falls ? ", falling" : "";
  call(named("solve", size, cost, option), memory, [&] { return transport_solve(problem); });
}

void apply(const Size& size, int64_t cost, int64_t values, bool weighted) {
  Memory memory;
  TransportCall problem = transport_call(memory, size, cost);
  take_potentials(memory, problem);
  problem.values = values;
  problem.v = memory.numbers(size.batch * size.columns * values);
  if (weighted) {
    problem.weights = size.features;
    problem.h = memory.numbers(size.batch * size.rows * size.features);
    problem.k = memory.numbers(size.batch * size.columns * size.features);
    problem.over_distance = cost == 2 ? 1 : 0;
  }
  problem.out = memory.output(size.batch * size.rows * values);
  call(named("apply", size, cost, weighted ? ", weighted" : ""), memory, [&] { return transport_apply(problem, 0); });
}

void plan(const Size& size) {
  Memory memory;
  TransportCall problem = transport_call(memory, size, 0);
  take_potentials(memory, problem);
  problem.out = memory.output(size.batch * size.rows * size.columns);
  call(named("plan", size, 0), memory, [&] { return transport_apply(problem, 1); });
}

}  // namespace

void sinkhorn_calls() {
  for (const Size& size : kSizes) {
    for (int64_t cost = 0; cost < kCosts; ++cost) {
      solve(size, cost, false, false, false);
      solve(size, cost, true, false, false);
      solve(size, cost, false, true, false);
      if (cost > 0 && size.rows > size.columns / 2)
        solve({size.batch, size.rows, size.rows, size.features}, cost, true, false, true);
    }
  }
}

void sinkhorn_apply_calls() {
  for (const Size& size : kSizes) {
    plan(size);
    for (int64_t cost = 0; cost < kCosts; ++cost) {
      for (const int64_t values : {0, 1, 20, 70}) apply(size, cost, values, false);
      if (cost > 0) apply(size, cost, 20, true);
    }
  }
}

void sinkhorn_unrolled_calls() {
  for (const Size& size : kSizes) {
    if (size.rows > tilewise::kSmall || size.columns > tilewise::kSmall) continue;
    for (const double rho : {0.0, 0.7}) {
      Memory memory;
      TransportCall problem = transport_call(memory, size, 0);
      problem.max_iter = 3;
      problem.rho_a = rho;
      problem.grad_f = memory.numbers(size.batch * size.rows);
      problem.grad_g = memory.numbers(size.batch * size.columns);
      problem.grad_cost = memory.output(size.batch * size.rows * size.columns);
      problem.grad_a = memory.output(size.batch * size.rows);
      problem.grad_b = memory.output(size.batch * size.columns);
      problem.grad_epsilon = memory.output(size.batch);
      call(named("unrolled", size, 0), memory, [&] { return transport_unrolled(problem); });
    }
  }
}

}  // namespace race
