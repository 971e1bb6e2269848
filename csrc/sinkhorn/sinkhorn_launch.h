// The launches of one call on a GPU, in order, and the scratch memory between them (host only, raw pointers).
//
// Nobody waits for the device: all max_iter iterations are launched, and those of a problem that has stopped return at
// once. A problem has stopped where its n_iter is behind the iteration.
#pragma once

#include <algorithm>
#include <cmath>

#include "sinkhorn/matrix_parts.h"
#include "sinkhorn/sinkhorn.h"

namespace tilewise {

constexpr float kLowest = -3.4e38f;  // below every score of a pair that is not forbidden

constexpr int kTileRows = 64;  // rows and columns of a tile

TILEWISE_FN int64_t row_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// When iteration t of a problem counts: what its rows' errors, one sum for each tile of rows, decide.
struct SinkhornDecision {
  int64_t t = 0;
  int64_t max_iter = 0;
  float tol = 0.0f;
  float scaling = 0.5f;
  bool symmetric = false;
  const Stage<float>* stages = nullptr;  // (batch,) of this iteration; null: epsilon does not fall
  Stage<float>* following = nullptr;     // of the next
  const float* epsilon = nullptr;
  const float* partials = nullptr;  // (batch, tiles)
  int64_t tiles = 0;
  const float* mass = nullptr;  // (batch,)
  float* error = nullptr;
  int64_t* n_iter = nullptr;
};

// The first launch.
struct SinkhornPrepare {
  SinkhornCall<float> call;
  float* mass = nullptr;
  Stage<float>* stages = nullptr;
  unsigned* tickets = nullptr;  // (batch, tickets_of_problem)
  int64_t tickets_of_problem = 0;
};

// Half an iteration: new potentials `after` of the rows of `pairs`, which are the columns of the problem in turn, from
// those that they had `before`. With `own` it also takes the error of the rows in these; without, it decides first
// whether it counts.
struct SinkhornHalfStep {
  Pairs<float> pairs;
  const float* x_squares = nullptr;
  const float* y_squares = nullptr;
  const float* from = nullptr;           // (batch, columns): the potentials of the other side
  const float* averaged_from = nullptr;  // and of an averaged update
  const float* other = nullptr;          // their marginal
  const float* own = nullptr;
  const float* before = nullptr;
  float* after = nullptr;
  float* partials = nullptr;
  float rho = infinity<float>();
  bool symmetric = false;
  SinkhornDecision decision;
  MatrixParts parts;            // of a matrix
  RowSum* sums = nullptr;       // (batch, parts, rows)
  unsigned* tickets = nullptr;  // (batch, strips): of parts that have ended, in this half-step and those before
};

// The last launch: the potentials that count, the value, and the error after max_iter iterations.
struct SinkhornFinish {
  SinkhornCall<float> call;
  const float* second = nullptr;  // f after an odd number of iterations
  SinkhornDecision decision;
};

const char* sinkhorn_squares_cuda(const float* points, int64_t count, int64_t features, float* squares, void* stream);
const char* sinkhorn_prepare_cuda(const SinkhornPrepare& prepare, void* stream);
const char* sinkhorn_matrix_half_step_cuda(const SinkhornHalfStep& step, void* stream);
const char* sinkhorn_half_step_cuda(const SinkhornHalfStep& step, void* stream);
// Of points with so many features that their products are the work, and a cost by products.
constexpr int64_t kProductFeatures = 24;
const char* sinkhorn_product_half_step_cuda(const SinkhornHalfStep& step, void* stream);
const char* sinkhorn_decide_cuda(const SinkhornDecision& decision, int64_t batch, void* stream);
const char* sinkhorn_finish_cuda(const SinkhornFinish& finish, void* stream);
const char* sinkhorn_apply_cuda(const SinkhornApply<float>& call, const float* x_squares, const float* y_squares,
                                void* stream);
const char* sinkhorn_plan_cuda(const SinkhornApply<float>& call, void* stream);
const char* sinkhorn_small_apply_cuda(const SinkhornApply<float>& call, void* stream);
const char* sinkhorn_small_plan_cuda(const SinkhornApply<float>& call, void* stream);
const char* sinkhorn_small_cuda(const SinkhornCall<float>& call, void* stream);
const char* sinkhorn_unrolled_cuda(const SinkhornUnrolled<float>& call, float* history, void* stream);

inline Pairs<float> swapped(const Pairs<float>& pairs) {
  Pairs<float> other = pairs;
  other.rows = pairs.columns;
  other.columns = pairs.rows;
  other.row_stride = pairs.column_stride;
  other.column_stride = pairs.row_stride;
  other.x = pairs.y;
  other.y = pairs.x;
  return other;
}

class SinkhornLaunches {
 public:
  SinkhornLaunches(void* scratch, void* stream) : next_(static_cast<float*>(scratch)), stream_(stream) {}

  static int64_t solve_bytes(const SinkhornCall<float>& call) {
    const Pairs<float>& pairs = call.pairs;
    if (is_small(pairs)) return 0;
    const Parts parts(pairs);
    return bytes(pairs.batch * (pairs.rows + parts.errors + 1 + parts.tickets) + parts.sums + squares_floats(pairs) +
                 stage_floats(call));
  }
  static int64_t apply_bytes(const SinkhornApply<float>& call) {
    return applies_by_pairs(call) ? 0 : bytes(squares_floats(call.pairs));
  }
  static int64_t unrolled_bytes(const SinkhornUnrolled<float>& call) { return bytes(unrolled_floats(call)); }

  const char* solve(const SinkhornCall<float>& call) {
    const Pairs<float>& pairs = call.pairs;
    if (is_small(pairs)) return sinkhorn_small_cuda(call, stream_);
    const Squares squares = squares_of(pairs);
    const Parts parts(pairs);
    float* second = take(pairs.batch * pairs.rows);
    float* partials = take(pairs.batch * parts.errors);
    float* mass = take(pairs.batch);
    float* of_stages = take(stage_floats(call));
    Stage<float>* stages = call.start == nullptr ? nullptr : reinterpret_cast<Stage<float>*>(of_stages);
    unsigned* tickets = reinterpret_cast<unsigned*>(take(pairs.batch * parts.tickets));
    RowSum* sums = reinterpret_cast<RowSum*>(take(parts.sums));
    run(sinkhorn_prepare_cuda({call, mass, stages, tickets, parts.tickets}, stream_));

    SinkhornDecision decision;
    decision.max_iter = call.max_iter;
    decision.tol = call.tol;
    decision.scaling = call.scaling;
    decision.symmetric = call.symmetric;
    decision.epsilon = call.epsilon;
    decision.partials = partials;
    decision.tiles = parts.errors;
    decision.mass = mass;
    decision.error = call.error;
    decision.n_iter = call.n_iter;

    SinkhornHalfStep rows{.pairs = pairs, .x_squares = squares.x, .y_squares = squares.y};
    rows.from = call.g;
    rows.other = call.b;
    rows.own = call.a;
    rows.partials = partials;
    rows.rho = call.rho_a;
    rows.symmetric = call.symmetric;
    rows.parts = parts.of_rows;
    rows.sums = sums;
    rows.tickets = tickets;
    SinkhornHalfStep columns{.pairs = swapped(pairs), .x_squares = squares.y, .y_squares = squares.x};
    columns.other = call.a;
    columns.before = columns.after = call.g;
    columns.rho = call.rho_b;
    columns.parts = parts.of_columns;
    columns.sums = sums;
    columns.tickets = tickets + pairs.batch * parts.of_rows.strips;
    // A pass after the last iteration is for its error alone.
    for (int64_t t = 0; t <= call.max_iter && error_ == nullptr; ++t) {
      decision.t = t;
      if (stages != nullptr) {
        decision.stages = stages + t % 2 * pairs.batch;
        decision.following = stages + (t + 1) % 2 * pairs.batch;
      }
      rows.decision = columns.decision = decision;
      rows.before = t % 2 == 0 ? call.f : second;
      rows.after = t % 2 == 0 ? second : call.f;
      if (call.symmetric) rows.from = rows.before;
      rows.averaged_from = rows.from;
      columns.from = rows.after;
      columns.averaged_from = rows.before;
      run(sinkhorn_half_step_cuda(rows, stream_));
      if (t == call.max_iter) break;
      run(call.symmetric ? sinkhorn_decide_cuda(decision, pairs.batch, stream_)
                         : sinkhorn_half_step_cuda(columns, stream_));
    }
    run(sinkhorn_finish_cuda({call, second, decision}, stream_));
    return error_;
  }

  const char* apply(const SinkhornApply<float>& call) {
    if (applies_by_pairs(call)) return sinkhorn_small_apply_cuda(call, stream_);
    const Squares squares = squares_of(call.pairs);
    run(sinkhorn_apply_cuda(call, squares.x, squares.y, stream_));
    return error_;
  }

  const char* plan(const SinkhornApply<float>& call) {
    return is_small(call.pairs) ? sinkhorn_small_plan_cuda(call, stream_) : sinkhorn_plan_cuda(call, stream_);
  }

  const char* unrolled(const SinkhornUnrolled<float>& call) {
    return sinkhorn_unrolled_cuda(call, take(unrolled_floats(call)), stream_);
  }

 private:
  // Of both half-steps over a matrix, and what they keep; points have strips of tiles alone.
  struct Parts {
    explicit Parts(const Pairs<float>& pairs) {
      if (!pairs.is_matrix()) {
        errors = row_tiles(pairs.rows);
        return;
      }
      const Pairs<float> columns = swapped(pairs);
      of_rows = MatrixParts::of(pairs);
      of_columns = MatrixParts::of(columns);
      errors = of_rows.strips;
      tickets = of_rows.strips + of_columns.strips;
      sums = std::max(of_rows.sums(pairs), of_columns.sums(columns)) * 2;
    }

    MatrixParts of_rows, of_columns;
    int64_t errors = 0, tickets = 0;  // of a problem
    int64_t sums = 0;                 // in floats
  };

  // Of what would leave most of a tile empty.
  static bool applies_by_pairs(const SinkhornApply<float>& call) {
    constexpr int64_t kMostLines = kTileRows / 2, kMostValues = 4096;
    return call.pairs.rows <= kMostLines && call.pairs.columns <= kMostLines && call.values <= kMostValues;
  }
  static int64_t stage_floats(const SinkhornCall<float>& call) {
    constexpr int64_t kFloats = sizeof(Stage<float>) / sizeof(float);
    return call.start == nullptr ? 0 : 2 * kFloats * call.pairs.batch;  // of this iteration and the next
  }
  static int64_t bytes(int64_t floats) { return floats * static_cast<int64_t>(sizeof(float)); }
  static int64_t unrolled_floats(const SinkhornUnrolled<float>& call) {
    return call.pairs.batch * call.max_iter * (call.pairs.rows + call.pairs.columns);
  }

  struct Squares {
    const float* x = nullptr;
    const float* y = nullptr;
  };

  static bool wants_squares(const Pairs<float>& pairs) {
    return with_cost(pairs.cost, [](auto cost) { return decltype(cost)::kByProducts; });
  }
  static int64_t squares_floats(const Pairs<float>& pairs) {
    return wants_squares(pairs) ? pairs.batch * (pairs.rows + pairs.columns) : 0;
  }

  float* take(int64_t floats) {
    float* begin = next_;
    next_ += floats;
    return begin;
  }

  void run(const char* error) {
    if (error_ == nullptr) error_ = error;
  }

  Squares squares_of(const Pairs<float>& pairs) {
    if (!wants_squares(pairs)) return {};
    const int64_t rows = pairs.batch * pairs.rows, columns = pairs.batch * pairs.columns;
    float* x = take(rows);
    float* y = take(columns);
    run(sinkhorn_squares_cuda(pairs.x, rows, pairs.features, x, stream_));
    run(sinkhorn_squares_cuda(pairs.y, columns, pairs.features, y, stream_));
    return {x, y};
  }

  float* next_;
  void* stream_;
  const char* error_ = nullptr;
};

}  // namespace tilewise
