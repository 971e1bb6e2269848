// The losses of the pairwise engine (pairwise/fold.h says what a program is), as in triton_kernels/pairwise_losses.py.
#pragma once

#include "pairwise/fold.h"

namespace tilewise {

// log(e^0 + sum of e^(x - shift)) + shift with shift = max(0, max x)
template <typename T>
TILEWISE_FN T log_one_plus(T shift, T sum) {
  return shift > T(0) ? shift + natural_log(fast_exp(-shift) + sum) : natural_log1p(sum);
}

// L = mean_P f + mean_N f of f(z, relation); term gives f and its derivative
template <typename T, typename Row, typename Term>
TILEWISE_PROGRAM void mean_by_kind(Row& row, const Term& term) {
  const Values<T, 4> sums = row.template fold<Sum, Sum, Sum, Sum>([=](auto z, auto relation) {
    const auto f = term(z, relation).value[0];
    return values(relation > 0 ? f : T(0), relation > 0 ? T(1) : T(0), relation < 0 ? f : T(0),
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
    return relation != 0 ? (relation > 0 ? positive : negative) * term(z, relation).value[1] : T(0);
  });
}

// L = f(lse_P x + lse_N x) of exponents x(z, relation), of rows with pairs of both kinds; term gives x, outer f, with
// their derivatives
template <typename T, typename Row, typename Term, typename Outer>
TILEWISE_PROGRAM void log_sums(Row& row, const Term& term, const Outer& outer) {
  const Values<T, 2> tops = row.template fold<Max, Max>([=](auto z, auto relation) {
    const auto x = term(z, relation).value[0];
    return values(relation > 0 ? x : -infinity<T>(), relation < 0 ? x : -infinity<T>());
  });
  const T positive_top = tops.value[0];
  const T negative_top = tops.value[1];
  if (positive_top == -infinity<T>() || negative_top == -infinity<T>()) return row.skip();
  const auto exponential = [=](auto x, auto relation) {
    return fast_exp(x - (relation > 0 ? positive_top : negative_top));
  };
  const Values<T, 2> sums = row.template fold<Sum, Sum>([=](auto z, auto relation) {
    const auto e = exponential(term(z, relation).value[0], relation);
    return values(relation > 0 ? e : T(0), relation < 0 ? e : T(0));
  });
  const Values<T, 2> loss =
      outer((positive_top + natural_log(sums.value[0])) + (negative_top + natural_log(sums.value[1])));
  row.finish(loss.value[0]);
  if (!row.wants_gradient()) return;
  const T positive = loss.value[1] / sums.value[0];
  const T negative = loss.value[1] / sums.value[1];
  row.write([=](auto z, auto relation) {
    const auto x = term(z, relation);
    const auto share = (relation > 0 ? positive : negative) * exponential(x.value[0], relation);
    return relation != 0 ? share * x.value[1] : T(0);
  });
}

// L = lse_{P+N} z - mean_P z                                     SupCon, InfoNCE (one positive), NT-Xent
struct Softmax {
  static constexpr PairProgram kProgram{"softmax", 0};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row) {
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
};

// L = mean_P softplus(lse_N z - z_p)                             the positives are no part of the denominator
struct DecoupledSoftmax {
  static constexpr PairProgram kProgram{"decoupled_softmax", 0};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row) {
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
        row.template fold<Sum>([=](auto z, auto relation) { return relation < 0 ? fast_exp(z - max) : T(0); });
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
};

// L = sum_P softplus(-z) + sum_N softplus(z)                     SigLIP
struct Sigmoid {
  static constexpr PairProgram kProgram{"sigmoid", 0};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row) {
    const auto loss = [](auto z, auto relation) { return relation != 0 ? softplus(relation > 0 ? -z : z) : T(0); };
    if (!row.wants_gradient()) return row.finish(row.template fold<Sum>(loss));
    row.finish(row.write_and_sum([=](auto z, auto relation) {
      const auto p = sigmoid(relation > 0 ? -z : z);
      return values(relation != 0 ? (relation > 0 ? -p : p) : T(0), loss(z, relation));
    }));
  }
};

// L = (1/alpha) log(1 + sum_P' e^(-alpha (z - base))) + (1/beta) log(1 + sum_N' e^(beta (z - base)))
// Mining keeps N' = {n: z_n + epsilon > min_P z} and P' = {p: z_p - epsilon < max_N z}; a row without either has no
// loss. epsilon = inf keeps all, and a row of one kind has the loss of that kind.
struct MultiSimilarity {
  static constexpr PairProgram kProgram{"multi_similarity", 4};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row, T alpha, T beta, T base, T epsilon) {
    const Extremes<T> ends = extremes<T>(row);
    const T least = ends.least;
    const T most = ends.most;
    const bool mines = epsilon != infinity<T>();
    if (mines ? least == infinity<T>() || most == -infinity<T>() : least == infinity<T>() && most == -infinity<T>())
      return row.skip();
    const T below = mines ? most : infinity<T>();
    const T above = mines ? least : -infinity<T>();
    const T margin = mines ? epsilon : T(0);
    // Of a kind that keeps any pair, the hardest is kept.
    if (mines && !(least - margin < below && most + margin > above)) return row.skip();
    const auto kept = [=](auto z, auto relation) {  // of a negative: z + margin > above
      return (relation != 0) & ((relation > 0 ? z : -z) - margin < (relation > 0 ? below : -above));
    };
    const T positive_shift = least < base ? -alpha * (least - base) : T(0);
    const T negative_shift = most > base ? beta * (most - base) : T(0);
    const auto exponential = [=](auto z, auto relation) {  // 0 of pairs that are not kept
      const auto x = (relation > 0 ? -alpha : beta) * (z - base) - (relation > 0 ? positive_shift : negative_shift);
      return fast_exp(kept(z, relation) ? x : -infinity<T>());
    };
    const Values<T, 2> sums = row.template fold<Sum, Sum>([=](auto z, auto relation) {
      const auto e = exponential(z, relation);
      return values(relation > 0 ? e : T(0), relation < 0 ? e : T(0));
    });
    row.finish(log_one_plus(positive_shift, sums.value[0]) / alpha +
               log_one_plus(negative_shift, sums.value[1]) / beta);
    if (!row.wants_gradient()) return;
    const T positive = T(-1) / (fast_exp(-positive_shift) + sums.value[0]);
    const T negative = T(1) / (fast_exp(-negative_shift) + sums.value[1]);
    row.write([=](auto z, auto relation) { return (relation > 0 ? positive : negative) * exponential(z, relation); });
  }
};

// L = mean_P softplus(-alpha (z - base)) + mean_N softplus(beta (z - base))
struct BinomialDeviance {
  static constexpr PairProgram kProgram{"binomial_deviance", 3};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row, T alpha, T beta, T base) {
    mean_by_kind<T>(row, [=](auto z, auto relation) {
      const auto slope = relation > 0 ? -alpha : beta;
      return values(softplus(slope * (z - base)), slope * sigmoid(slope * (z - base)));
    });
  }
};

// L = max(0, log sum_P e^(positive_margin - z) + log sum_N e^(z - negative_margin))
struct LiftedStructure {
  static constexpr PairProgram kProgram{"lifted_structure", 2};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row, T positive_margin, T negative_margin) {
    const auto term = [](auto z, auto relation) { return values(relation > 0 ? -z : z, relation > 0 ? T(-1) : T(1)); };
    log_sums<T>(row, term, [=](T sum) {
      const T loss = sum + (positive_margin - negative_margin);
      return values(loss < T(0) ? T(0) : loss, loss > T(0) ? T(1) : T(0));  // NaN stays NaN
    });
  }
};

// L = mean_P max(0, positive_margin - z) + mean_N max(0, z - negative_margin)
struct Contrastive {
  static constexpr PairProgram kProgram{"contrastive", 2};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row, T positive_margin, T negative_margin) {
    mean_by_kind<T>(row, [=](auto z, auto relation) {
      const auto gap = relation > 0 ? positive_margin - z : z - negative_margin;
      return values(gap < T(0) ? T(0) : gap, gap > T(0) ? (relation > 0 ? T(-1) : T(1)) : T(0));
    });
  }
};

// L = max(0, max_N z - min_P z + margin)                         the hardest positive and negative; ties: lowest column
struct Triplet {
  static constexpr PairProgram kProgram{"triplet", 1};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row, T margin) {
    const Extremes<T> ends = extremes<T>(row);
    const T least = ends.least;
    const T most = ends.most;
    if (least == infinity<T>() || most == -infinity<T>()) return row.skip();
    const T loss = most - least + margin;
    row.finish(loss < T(0) ? T(0) : loss);
    if (!row.wants_gradient()) return;
    const int64_t positive = row.first([=](auto z, auto relation) { return relation > 0 && z == least; });
    const int64_t negative = row.first([=](auto z, auto relation) { return relation < 0 && z == most; });
    const T weight = loss > T(0) ? T(1) : T(0);
    row.write_two(positive, -weight, negative, weight);
  }
};

// L = softplus(lse_P x + lse_N x), x_p = a (1 - margin - z) with a = gamma max(0, 1 + margin - z) and x_n = a (z -
// margin) with a = gamma max(0, z + margin); the gradient takes a for a constant
struct Circle {
  static constexpr PairProgram kProgram{"circle", 2};
  template <typename T, typename Row>
  TILEWISE_PROGRAM void run(Row& row, T margin, T gamma) {
    const auto term = [=](auto z, auto relation) {
      const auto away = relation > 0 ? T(1) + margin - z : z + margin;
      const auto a = away > T(0) ? gamma * away : T(0);
      return values(a * (relation > 0 ? T(1) - margin - z : z - margin), relation > 0 ? -a : a);
    };
    log_sums<T>(row, term, [](T sum) { return values(softplus(sum), sigmoid(sum)); });
  }
};

using PairLosses = ProgramList<Softmax, DecoupledSoftmax, Sigmoid, MultiSimilarity, BinomialDeviance, LiftedStructure,
                               Contrastive, Triplet, Circle>;

}  // namespace tilewise
