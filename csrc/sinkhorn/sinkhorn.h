// Entropic optimal transport of batches of problems, n rows by m columns:
//
//   V = min_P <P, C> + eps KL(P | a b^T) (+ rho_a KL(P 1 | a) + rho_b KL(P^T 1 | b) in place of the constraints)
//   P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)
//
// An iteration updates f from g and then g from f,
//
//   f_i = -d eps log sum_j b_j exp((g_j - C_ij) / eps)        d = 1, with a penalty rho / (rho + eps)
//
// after which the columns are exact; the error is that of the rows, in the potentials before the update, at no extra
// cost:
//
//   sum_i |(P 1)_i - t_i| / sum_i a_i         t_i = a_i, with a penalty a_i exp(-f_i / rho)
//
// With a `start` epsilon falls from there by `scaling`, each time its problem is settled. That leaves potentials which
// are wrong for the next epsilon, in f + g as much as in f - g. The first iteration there is averaged: f and g go half
// the way, both from the other's old value, which ends the error in f + g at once (of near sets the one that matters,
// and the slow one for updates in turn). The others go 1.8 of the way and more, which ends the rest with the square
// root of the iterations (Thibault et al., 2021); before a problem stops, and in its last iteration, they go 1.
//
// A symmetric problem (x = y, a = b) has f = g and takes averaged updates alone; at its end g is updated from f, so
// that columns are exact there, too.
//
// Costs are scores -C_ij / eps = factor z_ij - s_i - s_j, where z is the matrix given or formed from points:
//
//   matrix       z = C         factor = -1/eps
//   sqeuclidean  z = <x, y>    factor = 2/eps, s = |x|^2/eps
//   euclidean    z = |x - y|   factor = -1/eps
//
// Inside, potentials are in units of eps. A marginal may be 0 (its potential stays finite), a cost infinite (a pair
// that is forbidden); the potential of a row without a pair is 0.
#pragma once

#include "common/isa.h"
#include "common/math.h"
#include "sinkhorn/costs.h"

namespace tilewise {

template <typename T>
struct Pairs {
  int32_t cost = 0;  // its place in PairCosts: of the matrix
  int64_t batch = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  const T* matrix = nullptr;  // (batch, rows, columns)
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
  int64_t features = 0;
  const T* x = nullptr;     // (batch, rows, features), dense
  const T* y = nullptr;     // (batch, columns, features), dense
  bool allow_tf32 = false;  // in the products that the iterations form on a GPU

  TILEWISE_METHOD bool is_matrix() const { return cost == 0; }
};

template <typename T>
struct SinkhornCall {
  Pairs<T> pairs;
  const T* a = nullptr;        // (batch, rows)
  const T* b = nullptr;        // (batch, columns)
  const T* epsilon = nullptr;  // (batch,)
  const T* start = nullptr;    // (batch,) epsilon of the first iteration, from which it falls by `scaling`, or null
  T scaling = T(0.5);
  T rho_a = infinity<T>();  // infinity: a constraint
  T rho_b = infinity<T>();
  int64_t max_iter = 1;
  T tol = 0;
  bool symmetric = false;
  T* f = nullptr;             // (batch, rows): where to start, then the result
  T* g = nullptr;             // (batch, columns)
  T* value = nullptr;         // (batch,)
  T* error = nullptr;         // (batch,)
  int64_t* n_iter = nullptr;  // (batch,)
};

// out_i = sum_j P_ij w_ij v_j with w_ij = <h_i, k_j> (1 without h), divided by z_ij > 0 if over_distance. A marginal
// that is null counts as ones.
template <typename T>
struct SinkhornApply {
  Pairs<T> pairs;
  const T* a = nullptr;
  const T* b = nullptr;
  const T* epsilon = nullptr;
  const T* f = nullptr;
  const T* g = nullptr;
  const T* v = nullptr;  // (batch, columns, values)
  int64_t values = 0;
  const T* h = nullptr;  // (batch, rows, weights)
  const T* k = nullptr;  // (batch, columns, weights)
  int64_t weights = 0;
  bool over_distance = false;
  T* out = nullptr;  // (batch, rows, values); of a plan (batch, rows, columns)
};

// Derivatives of the potentials after max_iter iterations from 0, for upstream gradients of f and g.
template <typename T>
struct SinkhornUnrolled {
  Pairs<T> pairs;  // a matrix, at most kSmall x kSmall
  const T* a = nullptr;
  const T* b = nullptr;
  const T* epsilon = nullptr;
  T rho_a = infinity<T>();
  T rho_b = infinity<T>();
  int64_t max_iter = 1;
  const T* grad_f = nullptr;
  const T* grad_g = nullptr;
  T* grad_cost = nullptr;  // (batch, rows, columns), dense
  T* grad_a = nullptr;
  T* grad_b = nullptr;
  T* grad_epsilon = nullptr;  // (batch,)
};

constexpr int64_t kSmall = 64;

template <typename T>
bool is_small(const Pairs<T>& pairs) {
  return pairs.rows <= kSmall && pairs.columns <= kSmall;
}

constexpr int64_t kMaxUnrolled = 10'000;  // iterations that are differentiated, all of which are kept

template <typename T>
TILEWISE_FN T damping(T rho, T epsilon) {
  return rho < infinity<T>() ? rho / (rho + epsilon) : T(1);
}

// t_i / a_i
template <typename T>
TILEWISE_FN T target_ratio(T f, T epsilon, T rho) {
  return rho < infinity<T>() ? fast_exp(-f * epsilon / rho) : T(1);
}

// What one iteration of a problem does. `step` is how far updates go: 1/2 (averaged), 1 (exact) or `relaxed`, which
// grows the longer a problem takes.
template <typename T>
struct Stage {
  T epsilon;
  T step = 1;
  T before = 1;  // the step that the potentials come from: after 1 the columns are exact
  T relaxed = T(1.8);

  TILEWISE_METHOD bool averages() const { return step < T(1); }
};

// The stages of a problem, each from the error that the one before found.
template <typename T>
struct Schedule {
  T epsilon;
  T tol;
  T scaling;
  int64_t max_iter;
  bool falls;  // from a start
  bool symmetric;

  TILEWISE_METHOD Stage<T> first(T start) const {
    if (!falls) return {epsilon};
    return {start > epsilon ? start : epsilon, max_iter == 1 ? T(1) : T(0.5), T(0.5)};
  }

  // Whether the potentials before iteration t, which have this error, are the solution.
  TILEWISE_METHOD bool stops(const Stage<T>& stage, T error, int64_t t) const {
    if (!falls) return t > 0 && error <= tol;
    return stage.epsilon == epsilon && !stage.averages() && (stage.before == T(1) || symmetric) && error <= tol;
  }

  TILEWISE_METHOD Stage<T> next(const Stage<T>& stage, T error, int64_t t) const {
    if (!falls) return stage;
    const bool last = stage.epsilon == epsilon;
    const T enough = !last && tol < T(0.005) ? T(0.005) : tol;
    // A relaxed update leaves its own overshoot in the rows, which the next exact one takes away.
    const T own = stage.before > T(1) && !symmetric ? 2 * (2 - stage.before) : T(1);
    const bool settled = !stage.averages() && own * error <= enough;
    Stage<T> following{stage.epsilon, stage.relaxed, stage.step, stage.relaxed};
    if (!last && (settled || is_late(stage.epsilon, t))) {
      const T fallen = stage.epsilon * scaling;
      following = {fallen > epsilon ? fallen : epsilon, T(0.5), stage.step};
    } else if (settled || !(error < T(0.5))) {
      following.step = 1;
    } else {
      following.relaxed = 2 - 1 / (1 / (2 - stage.relaxed) + T(0.1));
    }
    if (t + 2 == max_iter) following.step = 1;
    return following;
  }

 private:
  // Half of the iterations are for the last epsilon.
  TILEWISE_METHOD bool is_late(T now, int64_t t) const {
    int64_t left = max_iter / 2 - t - 1;
    if (left <= 0) return true;
    double fall = 1.0;  // scaling^left: ::pow would be a call, around which a GPU keeps few registers
    for (double power = scaling; left > 0; left /= 2, power *= power) fall *= left % 2 == 1 ? power : 1.0;
    return now * T(fall) > epsilon;
  }
};

// One marginal's part of the dual objective, without the mass of P: a_i f_i, or -rho a_i (exp(-f_i / rho) - 1).
template <typename T>
TILEWISE_FN double dual_term(T a, T f, T rho) {
  if (!(rho < infinity<T>())) return static_cast<double>(a) * f;
  return -static_cast<double>(rho) * a * ::expm1(-static_cast<double>(f) / rho);
}

// What the value of a problem is made of, over its rows and its columns, which are exact: they have the mass of P.
// Potentials are in units of the cost.
struct ValueSums {
  double dual = 0.0, of_a = 0.0, of_b = 0.0, mass = 0.0;

  template <typename T>
  TILEWISE_METHOD void add_row(T a, T f, T rho) {
    dual += dual_term(a, f, rho);
    of_a += a;
  }
  template <typename T>
  TILEWISE_METHOD void add_column(T b, T g, T rho) {
    dual += dual_term(b, g, rho);
    of_b += b;
    mass += static_cast<double>(b) * target_ratio(g, T(1), rho);
  }
  TILEWISE_METHOD double value(double epsilon) const { return dual - epsilon * (mass - of_a * of_b); }
};

}  // namespace tilewise
