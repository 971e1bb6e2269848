// What one part of the columns adds to a row's loss, for losses over columns that travel from rank to rank: programs
// that are not losses (pairwise/fold.h); triton_kernels/pairwise_shares.py has the same in the same order.
#pragma once

#include "pairwise/fold.h"

namespace tilewise {

// L = lse_K slope z of the kept pairs K, -inf without any
template <typename T, typename Row, typename Kept>
TILEWISE_PROGRAM void log_sum_exp_of(Row& row, T slope, const Kept& kept) {
  const T max =
      row.template fold<Max>([=](auto z, auto relation) { return kept(z, relation) ? slope * z : -infinity<T>(); });
  if (max == -infinity<T>()) {
    row.finish(max);
    if (row.wants_gradient()) row.write_two(-1, T(0), -1, T(0));
    return;
  }
  const auto exponent = [=](auto z, auto relation) { return kept(z, relation) ? slope * z - max : -infinity<T>(); };
  const T log_sum =
      natural_log(row.template fold<Sum>([=](auto z, auto relation) { return fast_exp(exponent(z, relation)); }));
  row.finish(max + log_sum);
  if (!row.wants_gradient()) return;
  row.write([=](auto z, auto relation) { return slope * fast_exp(exponent(z, relation) - log_sum); });
}

// L = the total of Op over z of the chosen pairs, none without any; the first of equals has the gradient
template <typename Op, typename T, typename Row, typename Chosen>
TILEWISE_PROGRAM void extreme_of(Row& row, T none, const Chosen& chosen) {
  const T extreme = row.template fold<Op>([=](auto z, auto relation) { return chosen(relation) ? z : none; });
  row.finish(extreme);
  if (!row.wants_gradient()) return;
  const int64_t column = row.first([=](auto z, auto relation) { return chosen(relation) && z == extreme; });
  row.write_two(column, T(1), -1, T(0));
}

// L = lse_{P+N} z                                                of Softmax
struct LogSumExp {
  static constexpr PairProgram kProgram{"log_sum_exp", 0};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row) {
    log_sum_exp_of(row, T(1), [](auto, auto relation) { return relation != 0; });
  }
};

// L = sum_P z                                                    of Softmax
struct PositiveSum {
  static constexpr PairProgram kProgram{"positive_sum", 0};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row) {
    row.finish(row.template fold<Sum>([](auto z, auto relation) { return relation > 0 ? z : T(0); }));
    if (row.wants_gradient()) row.write([](auto, auto relation) { return relation > 0 ? T(1) : T(0); });
  }
};

// L = min_P z, inf without positives                             of MultiSimilarity, which mines by it
struct LeastPositive {
  static constexpr PairProgram kProgram{"least_positive", 0};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row) {
    extreme_of<Min>(row, infinity<T>(), [](auto relation) { return relation > 0; });
  }
};

// L = max_N z, -inf without negatives
struct MostNegative {
  static constexpr PairProgram kProgram{"most_negative", 0};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row) {
    extreme_of<Max>(row, -infinity<T>(), [](auto relation) { return relation < 0; });
  }
};

// L = lse slope z over the positives with z < limit (side > 0) or the negatives with z > -limit (side < 0): what
// MultiSimilarity keeps, with the extreme of the other kind taken off z
struct WindowLogSumExp {
  static constexpr PairProgram kProgram{"window_log_sum_exp", 3};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row, T slope, T limit, T side) {
    const int kind = side > T(0) ? 1 : -1;
    const T sign = side > T(0) ? T(1) : T(-1);
    log_sum_exp_of(row, slope, [=](auto z, auto relation) { return (relation == kind) & (sign * z < limit); });
  }
};

using PairShares = ProgramList<LogSumExp, PositiveSum, LeastPositive, MostNegative, WindowLogSumExp>;

}  // namespace tilewise
