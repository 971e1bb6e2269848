// The losses of the pairwise engine, each a program over one row of similarities. z = scale s + bias; P and N are the
// row's positive and negative pairs, #P and #N their numbers. A Row offers
//
//   fold<Op...>(f)    for every pair f(z, relation) gives one value per Op (Sum, Max, Min): their totals
//   first(f)          the lowest column with f(z, relation), or -1
//   finish(loss)      the loss of an active row;  skip() one without the pairs that the loss needs: 0, no gradient
//   wants_gradient()
//   write(f)          dL/dz of every pair: f(z, relation)
//   write_two(...)    of two pairs, given by column (-1: none) and value; 0 of all others
//
// with relation 1 for positives, -1 for negatives, 0 for what is neither, which adds nothing to a fold. On a CPU z and
// relation are vectors.
#pragma once

#include <type_traits>

#include "pairwise/pairwise.h"

// A program runs where its Row does: on a GPU with all threads of the row.
#if defined(__CUDACC__)
#define TILEWISE_PROGRAM static __device__ __forceinline__
#else
#define TILEWISE_PROGRAM static inline
#endif

namespace tilewise {

struct Sum {};
struct Max {};
struct Min {};

template <typename T, int kCount>
struct Values {
  T value[kCount];
};

template <typename T, typename... More>
TILEWISE_FN Values<T, 1 + sizeof...(More)> values(T first, More... more) {
  return {first, more...};
}

// log(e^0 + sum of e^(x - shift)) + shift with shift = max(0, max x)
template <typename T>
TILEWISE_FN T log_one_plus(T shift, T sum) {
  return shift > T(0) ? shift + natural_log(fast_exp(-shift) + sum) : natural_log1p(sum);
}

// L = lse_{P+N} z - mean_P z                                     SupCon, InfoNCE (one positive), NT-Xent
template <typename T, typename Row>
TILEWISE_PROGRAM void softmax_loss(Row& row) {
  const Values<T, 2> all = row.template fold<Max, Sum>(
      [](auto z, auto relation) { return values(relation != 0 ? z : -infinity<T>(), relation > 0 ? T(1) : T(0)); });
  const T max = all.value[0];
  const T positives = all.value[1];
  if (positives == T(0)) return row.skip();
  const Values<T, 3> sums = row.template fold<Sum, Sum, Sum>([=](auto z, auto relation) {
    const auto e = fast_exp(z - max);
    return values(relation > 0 ? e : T(0), relation < 0 ? e : T(0), relation > 0 ? z - max : T(0));
  });
  // Apart: a positive that takes nearly all leaves to the negatives what 1 would swallow.
  const T positive = sums.value[0];
  const T negative = sums.value[1];
  const T sum = positive + negative;
  row.finish(natural_log1p((positive - T(1)) + negative) - sums.value[2] / positives);
  if (!row.wants_gradient()) return;
  const T inverse = T(1) / sum;
  const T share = inverse / positives;
  row.write([=](auto z, auto relation) {  // p, less 1 / #P at positives: 0 - negative of one positive
    const auto e = fast_exp(z - max);
    const auto pull = ((positives * e - positive) - negative) * share;
    return relation != 0 ? (relation > 0 ? pull : e * inverse) : T(0);
  });
}

// L = mean_P softplus(lse_N z - z_p)                             the positives are no part of the denominator
template <typename T, typename Row>
TILEWISE_PROGRAM void decoupled_softmax_loss(Row& row) {
  const Values<T, 2> all = row.template fold<Max, Sum>(
      [](auto z, auto relation) { return values(relation < 0 ? z : -infinity<T>(), relation > 0 ? T(1) : T(0)); });
  const T max = all.value[0];
  const T positives = all.value[1];
  if (positives == T(0)) return row.skip();
  if (max == -infinity<T>()) {
    row.finish(T(0));
    if (row.wants_gradient()) row.write([](auto z, auto) { return T(0) * z; });
    return;
  }
  const T sum =
      row.template fold<Sum>([=](auto z, auto relation) { return values(relation < 0 ? fast_exp(z - max) : T(0)); })
          .value[0];
  const T log_sum = natural_log(sum);
  const auto gap = [=](auto z) { return (max - z) + log_sum; };
  const Values<T, 2> terms = row.template fold<Sum, Sum>([=](auto z, auto relation) {
    return values(relation > 0 ? softplus(gap(z)) : T(0), relation > 0 ? sigmoid(gap(z)) : T(0));
  });
  row.finish(terms.value[0] / positives);
  if (!row.wants_gradient()) return;
  const T share = T(1) / positives;
  const T negative = terms.value[1] * share / sum;
  row.write([=](auto z, auto relation) {
    const auto value = relation > 0 ? -sigmoid(gap(z)) * share : negative * fast_exp(z - max);
    return relation != 0 ? value : T(0);
  });
}

// L = sum_P softplus(-z) + sum_N softplus(z)                     SigLIP
template <typename T, typename Row>
TILEWISE_PROGRAM void sigmoid_loss(Row& row) {
  const T loss = row.template fold<Sum>([](auto z, auto relation) {
                      return values(relation != 0 ? softplus(relation > 0 ? -z : z) : T(0));
                    })
                     .value[0];
  row.finish(loss);
  if (!row.wants_gradient()) return;
  row.write([](auto z, auto relation) {
    const auto p = sigmoid(relation > 0 ? -z : z);
    return relation != 0 ? (relation > 0 ? -p : p) : T(0);
  });
}

// L = (1/alpha) log(1 + sum_P' e^(-alpha (z - base))) + (1/beta) log(1 + sum_N' e^(beta (z - base)))
// Mining keeps N' = {n: z_n + epsilon > min_P z} and P' = {p: z_p - epsilon < max_N z}; a row without either has no
// loss. epsilon = inf keeps all, and a row of one kind has the loss of that kind.
template <typename T, typename Row>
TILEWISE_PROGRAM void multi_similarity_loss(Row& row, T alpha, T beta, T base, T epsilon) {
  const Values<T, 2> extremes = row.template fold<Min, Max>([](auto z, auto relation) {
    return values(relation > 0 ? z : infinity<T>(), relation < 0 ? z : -infinity<T>());
  });
  const T least = extremes.value[0];
  const T most = extremes.value[1];
  const bool mines = epsilon != infinity<T>();
  if (mines ? least == infinity<T>() || most == -infinity<T>() : least == infinity<T>() && most == -infinity<T>())
    return row.skip();
  const T above = mines ? least : -infinity<T>();
  const T below = mines ? most : infinity<T>();
  const T margin = mines ? epsilon : T(0);
  const auto kept = [=](auto z, auto relation) {
    return ((relation > 0) & (z - margin < below)) | ((relation < 0) & (z + margin > above));
  };
  const T positive_shift = least < base ? -alpha * (least - base) : T(0);
  const T negative_shift = most > base ? beta * (most - base) : T(0);
  const auto exponential = [=](auto z, auto relation) {
    return fast_exp(relation > 0 ? -alpha * (z - base) - positive_shift : beta * (z - base) - negative_shift);
  };
  const Values<T, 4> sums = row.template fold<Sum, Sum, Sum, Sum>([=](auto z, auto relation) {
    const auto e = kept(z, relation) ? exponential(z, relation) : T(0);
    const auto one = kept(z, relation) ? T(1) : T(0);
    return values(relation > 0 ? e : T(0), relation > 0 ? one : T(0), relation < 0 ? e : T(0),
                  relation < 0 ? one : T(0));
  });
  if (mines && (sums.value[1] == T(0) || sums.value[3] == T(0))) return row.skip();
  row.finish(log_one_plus(positive_shift, sums.value[0]) / alpha + log_one_plus(negative_shift, sums.value[2]) / beta);
  if (!row.wants_gradient()) return;
  const T positive = T(-1) / (fast_exp(-positive_shift) + sums.value[0]);
  const T negative = T(1) / (fast_exp(-negative_shift) + sums.value[2]);
  row.write([=](auto z, auto relation) {
    return kept(z, relation) ? (relation > 0 ? positive : negative) * exponential(z, relation) : T(0);
  });
}

// L = mean_P softplus(-alpha (z - base)) + mean_N softplus(beta (z - base))
template <typename T, typename Row>
TILEWISE_PROGRAM void binomial_deviance_loss(Row& row, T alpha, T beta, T base) {
  const Values<T, 4> sums = row.template fold<Sum, Sum, Sum, Sum>([=](auto z, auto relation) {
    const auto term = softplus(relation > 0 ? -alpha * (z - base) : beta * (z - base));
    return values(relation > 0 ? term : T(0), relation > 0 ? T(1) : T(0), relation < 0 ? term : T(0),
                  relation < 0 ? T(1) : T(0));
  });
  const T positives = sums.value[1];
  const T negatives = sums.value[3];
  if (positives + negatives == T(0)) return row.skip();
  const T positive = positives > T(0) ? T(1) / positives : T(0);
  const T negative = negatives > T(0) ? T(1) / negatives : T(0);
  row.finish(sums.value[0] * positive + sums.value[2] * negative);
  if (!row.wants_gradient()) return;
  row.write([=](auto z, auto relation) {
    const auto p = sigmoid(relation > 0 ? -alpha * (z - base) : beta * (z - base));
    return relation != 0 ? (relation > 0 ? -alpha * positive : beta * negative) * p : T(0);
  });
}

// L = max(0, log sum_P e^(positive_margin - z) + log sum_N e^(z - negative_margin))
template <typename T, typename Row>
TILEWISE_PROGRAM void lifted_structure_loss(Row& row, T positive_margin, T negative_margin) {
  const Values<T, 2> extremes = row.template fold<Min, Max>([](auto z, auto relation) {
    return values(relation > 0 ? z : infinity<T>(), relation < 0 ? z : -infinity<T>());
  });
  const T least = extremes.value[0];
  const T most = extremes.value[1];
  if (least == infinity<T>() || most == -infinity<T>()) return row.skip();
  const auto exponential = [=](auto z, auto relation) { return fast_exp(relation > 0 ? least - z : z - most); };
  const Values<T, 2> sums = row.template fold<Sum, Sum>([=](auto z, auto relation) {
    const auto e = relation != 0 ? exponential(z, relation) : T(0);
    return values(relation > 0 ? e : T(0), relation < 0 ? e : T(0));
  });
  const T loss = (positive_margin - least + natural_log(sums.value[0])) +  //
                 (most - negative_margin + natural_log(sums.value[1]));
  row.finish(loss < T(0) ? T(0) : loss);  // NaN stays NaN
  if (!row.wants_gradient()) return;
  const T positive = loss > T(0) ? T(-1) / sums.value[0] : T(0);
  const T negative = loss > T(0) ? T(1) / sums.value[1] : T(0);
  row.write([=](auto z, auto relation) {
    return relation != 0 ? (relation > 0 ? positive : negative) * exponential(z, relation) : T(0);
  });
}

// L = mean_P max(0, positive_margin - z) + mean_N max(0, z - negative_margin)
template <typename T, typename Row>
TILEWISE_PROGRAM void contrastive_loss(Row& row, T positive_margin, T negative_margin) {
  const Values<T, 4> sums = row.template fold<Sum, Sum, Sum, Sum>([=](auto z, auto relation) {
    const auto gap = relation > 0 ? positive_margin - z : z - negative_margin;
    const auto hinge = gap < T(0) ? T(0) : gap;
    return values(relation > 0 ? hinge : T(0), relation > 0 ? T(1) : T(0), relation < 0 ? hinge : T(0),
                  relation < 0 ? T(1) : T(0));
  });
  const T positives = sums.value[1];
  const T negatives = sums.value[3];
  if (positives + negatives == T(0)) return row.skip();
  const T positive = positives > T(0) ? T(1) / positives : T(0);
  const T negative = negatives > T(0) ? T(1) / negatives : T(0);
  row.finish(sums.value[0] * positive + sums.value[2] * negative);
  if (!row.wants_gradient()) return;
  row.write([=](auto z, auto relation) {
    const auto weight = relation > 0 ? (positive_margin - z > T(0) ? -positive : T(0))  //
                                     : (z - negative_margin > T(0) ? negative : T(0));
    return relation != 0 ? weight : T(0);
  });
}

// L = max(0, max_N z - min_P z + margin)                         the hardest positive and negative; ties: lowest column
template <typename T, typename Row>
TILEWISE_PROGRAM void triplet_loss(Row& row, T margin) {
  const Values<T, 2> extremes = row.template fold<Min, Max>([](auto z, auto relation) {
    return values(relation > 0 ? z : infinity<T>(), relation < 0 ? z : -infinity<T>());
  });
  const T least = extremes.value[0];
  const T most = extremes.value[1];
  if (least == infinity<T>() || most == -infinity<T>()) return row.skip();
  const T loss = most - least + margin;
  row.finish(loss < T(0) ? T(0) : loss);
  if (!row.wants_gradient()) return;
  const int64_t positive = row.first([=](auto z, auto relation) { return relation > 0 && z == least; });
  const int64_t negative = row.first([=](auto z, auto relation) { return relation < 0 && z == most; });
  const T weight = loss > T(0) ? T(1) : T(0);
  row.write_two(positive, -weight, negative, weight);
}

// L = lse_{P+N} z, -inf without pairs                            a share of softmax_loss, to be merged with others
template <typename T, typename Row>
TILEWISE_PROGRAM void log_sum_exp(Row& row) {
  const T max =
      row.template fold<Max>([](auto z, auto relation) { return values(relation != 0 ? z : -infinity<T>()); }).value[0];
  if (max == -infinity<T>()) {
    row.finish(max);
    if (row.wants_gradient()) row.write_two(-1, T(0), -1, T(0));
    return;
  }
  const T sum =
      row.template fold<Sum>([=](auto z, auto relation) { return values(relation != 0 ? fast_exp(z - max) : T(0)); })
          .value[0];
  const T log_sum = natural_log(sum);
  row.finish(max + log_sum);
  if (!row.wants_gradient()) return;
  row.write([=](auto z, auto relation) { return relation != 0 ? fast_exp((z - max) - log_sum) : T(0); });
}

// L = sum_P z
template <typename T, typename Row>
TILEWISE_PROGRAM void positive_sum(Row& row) {
  row.finish(row.template fold<Sum>([](auto z, auto relation) { return values(relation > 0 ? z : T(0)); }).value[0]);
  if (!row.wants_gradient()) return;
  row.write([](auto, auto relation) { return relation > 0 ? T(1) : T(0); });
}

// L = min_P z, inf without positives; L = max_N z, -inf without negatives       the first of equals has the gradient
template <typename T, typename Row>
TILEWISE_PROGRAM void least_positive(Row& row) {
  const T least =
      row.template fold<Min>([](auto z, auto relation) { return values(relation > 0 ? z : infinity<T>()); }).value[0];
  row.finish(least);
  if (!row.wants_gradient()) return;
  const int64_t column = row.first([=](auto z, auto relation) { return relation > 0 && z == least; });
  row.write_two(column, T(1), -1, T(0));
}

template <typename T, typename Row>
TILEWISE_PROGRAM void most_negative(Row& row) {
  const T most =
      row.template fold<Max>([](auto z, auto relation) { return values(relation < 0 ? z : -infinity<T>()); }).value[0];
  row.finish(most);
  if (!row.wants_gradient()) return;
  const int64_t column = row.first([=](auto z, auto relation) { return relation < 0 && z == most; });
  row.write_two(column, T(1), -1, T(0));
}

// L = lse of slope z, over the positives with z < limit (side > 0) or the negatives with z > -limit (side < 0); -inf
// without any. A share of what multi_similarity_loss keeps, with the extreme of the other kind taken off z.
template <typename T, typename Row>
TILEWISE_PROGRAM void window_log_sum_exp(Row& row, T slope, T limit, T side) {
  const auto kept = [=](auto z, auto relation) {
    return side > T(0) ? (relation > 0) & (z < limit) : (relation < 0) & (z > -limit);
  };
  const T max = row.template fold<Max>(
                       [=](auto z, auto relation) { return values(kept(z, relation) ? slope * z : -infinity<T>()); })
                    .value[0];
  if (max == -infinity<T>()) {
    row.finish(max);
    if (row.wants_gradient()) row.write_two(-1, T(0), -1, T(0));
    return;
  }
  const T sum = row.template fold<Sum>([=](auto z, auto relation) {
                     return values(kept(z, relation) ? fast_exp(slope * z - max) : T(0));
                   })
                    .value[0];
  const T log_sum = natural_log(sum);
  row.finish(max + log_sum);
  if (!row.wants_gradient()) return;
  row.write(
      [=](auto z, auto relation) { return kept(z, relation) ? slope * fast_exp((slope * z - max) - log_sum) : T(0); });
}

template <PairLoss kLoss, typename T, typename Row>
TILEWISE_PROGRAM void run_loss(const T (&p)[kPairParameters], Row& row) {
  if constexpr (kLoss == PairLoss::kSoftmax) softmax_loss<T>(row);
  if constexpr (kLoss == PairLoss::kDecoupledSoftmax) decoupled_softmax_loss<T>(row);
  if constexpr (kLoss == PairLoss::kSigmoid) sigmoid_loss<T>(row);
  if constexpr (kLoss == PairLoss::kMultiSimilarity) multi_similarity_loss<T>(row, p[0], p[1], p[2], p[3]);
  if constexpr (kLoss == PairLoss::kBinomialDeviance) binomial_deviance_loss<T>(row, p[0], p[1], p[2]);
  if constexpr (kLoss == PairLoss::kLiftedStructure) lifted_structure_loss<T>(row, p[0], p[1]);
  if constexpr (kLoss == PairLoss::kContrastive) contrastive_loss<T>(row, p[0], p[1]);
  if constexpr (kLoss == PairLoss::kTriplet) triplet_loss<T>(row, p[0]);
  if constexpr (kLoss == PairLoss::kLogSumExp) log_sum_exp<T>(row);
  if constexpr (kLoss == PairLoss::kPositiveSum) positive_sum<T>(row);
  if constexpr (kLoss == PairLoss::kLeastPositive) least_positive<T>(row);
  if constexpr (kLoss == PairLoss::kMostNegative) most_negative<T>(row);
  if constexpr (kLoss == PairLoss::kWindowLogSumExp) window_log_sum_exp<T>(row, p[0], p[1], p[2]);
}

// f of the loss as a constant: std::integral_constant
template <typename Function>
auto with_loss(PairLoss loss, Function f) {
  switch (loss) {
    case PairLoss::kSoftmax:
      return f(std::integral_constant<PairLoss, PairLoss::kSoftmax>{});
    case PairLoss::kDecoupledSoftmax:
      return f(std::integral_constant<PairLoss, PairLoss::kDecoupledSoftmax>{});
    case PairLoss::kSigmoid:
      return f(std::integral_constant<PairLoss, PairLoss::kSigmoid>{});
    case PairLoss::kMultiSimilarity:
      return f(std::integral_constant<PairLoss, PairLoss::kMultiSimilarity>{});
    case PairLoss::kBinomialDeviance:
      return f(std::integral_constant<PairLoss, PairLoss::kBinomialDeviance>{});
    case PairLoss::kLiftedStructure:
      return f(std::integral_constant<PairLoss, PairLoss::kLiftedStructure>{});
    case PairLoss::kContrastive:
      return f(std::integral_constant<PairLoss, PairLoss::kContrastive>{});
    case PairLoss::kTriplet:
      return f(std::integral_constant<PairLoss, PairLoss::kTriplet>{});
    case PairLoss::kLogSumExp:
      return f(std::integral_constant<PairLoss, PairLoss::kLogSumExp>{});
    case PairLoss::kPositiveSum:
      return f(std::integral_constant<PairLoss, PairLoss::kPositiveSum>{});
    case PairLoss::kLeastPositive:
      return f(std::integral_constant<PairLoss, PairLoss::kLeastPositive>{});
    case PairLoss::kMostNegative:
      return f(std::integral_constant<PairLoss, PairLoss::kMostNegative>{});
    default:
      return f(std::integral_constant<PairLoss, PairLoss::kWindowLogSumExp>{});
  }
}

}  // namespace tilewise
