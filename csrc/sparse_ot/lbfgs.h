// Limited-memory BFGS of one problem by a team of threads: one on a CPU, a block on a GPU. The function is evaluated
// elsewhere, at `trial`; a step then takes the trial or bisects its line search, and proposes the next.
//
// The line search is that of Lewis and Overton ("Nonsmooth optimization via quasi-Newton methods", 2013), which a kink
// does not mislead: it halves an interval from `low`, where the slope is still steep, to `high`, where the value has
// not decreased. Near the end, where values differ by less than their rounding, slopes decide (Hager and Zhang, 2005).
//
// A team has  first(): whether this thread writes numbers;  each(n, f): f(i) for all i, then all wait;
//             sum(n, f): the sum of f(i), known to all.
#pragma once

#include "common/platform.h"

namespace tilewise {

constexpr int kHistory = 10;
constexpr double kDecrease = 1e-4;  // of the weak Wolfe conditions
constexpr double kCurvature = 0.9;
constexpr int kSearches = 30;  // evaluations of one line search
constexpr int kPatience = 20;  // accepted steps without progress

struct LbfgsNumbers {
  double value;
  double slope;
  double step;
  double low;
  double high;
  double min_error;  // error so far
  int64_t n_iter;
  int32_t newest;
  int32_t pairs;
  int32_t searched;
  int32_t stalled;
  int32_t going;
};

template <typename T>
struct Lbfgs {
  int64_t size = 0;
  T unit = 0;               // rounding of T
  T* x = nullptr;           // accepted
  T* gradient = nullptr;    // at x
  T* trial = nullptr;       // where the function is evaluated
  T* there = nullptr;       // its gradient
  T* direction = nullptr;   // trial = x + step direction
  T* steps = nullptr;       // (kHistory, size), a ring
  T* changes = nullptr;     // of the gradient, likewise
  double* pairs = nullptr;  // (2, kHistory): 1 / <step, change>, and coefficients of the recursion
  LbfgsNumbers* numbers = nullptr;

  static constexpr int64_t kVectors = 5 + 2 * kHistory;
};

template <typename T, typename Team>
TILEWISE_FN double lbfgs_dot(const Team& team, int64_t size, const T* u, const T* v) {
  return team.sum(size, [=](int64_t i) { return static_cast<double>(u[i]) * static_cast<double>(v[i]); });
}

// direction = -(inverse of the Hessian) gradient, by the two-loop recursion over the pairs kept.
template <typename T, typename Team>
TILEWISE_FN void lbfgs_direction(const Team& team, const Lbfgs<T>& p, const LbfgsNumbers& now) {
  T* q = p.direction;
  team.each(p.size, [&](int64_t i) { q[i] = -p.gradient[i]; });
  double* along = p.pairs + kHistory;
  for (int back = 0; back < now.pairs; ++back) {
    const int at = (now.newest - back + kHistory) % kHistory;
    const T* step = p.steps + at * p.size;
    const T* change = p.changes + at * p.size;
    const double factor = p.pairs[at] * lbfgs_dot(team, p.size, step, q);
    if (team.first()) along[at] = factor;
    team.each(p.size, [&](int64_t i) { q[i] -= static_cast<T>(factor) * change[i]; });
  }
  if (now.pairs > 0) {
    const T* change = p.changes + now.newest * p.size;
    const T scale = static_cast<T>(1.0 / (p.pairs[now.newest] * lbfgs_dot(team, p.size, change, change)));
    team.each(p.size, [&](int64_t i) { q[i] *= scale; });
  }
  for (int back = now.pairs - 1; back >= 0; --back) {
    const int at = (now.newest - back + kHistory) % kHistory;
    const T* step = p.steps + at * p.size;
    const double factor = along[at] - p.pairs[at] * lbfgs_dot(team, p.size, p.changes + at * p.size, q);
    team.each(p.size, [&](int64_t i) { q[i] += static_cast<T>(factor) * step[i]; });
  }
}

// After an evaluation at p.trial, which gave p.there; the first is at p.x itself.
template <typename T, typename Team>
TILEWISE_FN void lbfgs_step(const Team& team, const Lbfgs<T>& p, double value, double error, double tol) {
  LbfgsNumbers now = *p.numbers;
  bool taken = true;
  if (now.n_iter++ == 0) {
    now.min_error = error;
  } else {
    const double slope = lbfgs_dot(team, p.size, p.there, p.direction);
    const double noise = 4.0 * p.unit * (now.value < 0 ? -now.value : now.value);
    const bool fits = value <= now.value + kDecrease * now.step * now.slope ||
                      (value <= now.value + noise && slope <= (2.0 * kDecrease - 1.0) * now.slope);
    const bool steep = slope < kCurvature * now.slope;
    taken = fits && !steep;
    if (!fits) now.high = now.step;
    if (fits && steep) now.low = now.step;
    if (taken) {
      const bool progress = now.value - value > noise || error < 0.5 * now.min_error;
      now.stalled = progress ? 0 : now.stalled + 1;
      if (error < now.min_error) now.min_error = error;
      const int next = (now.newest + 1) % kHistory;
      T* step = p.steps + next * p.size;
      T* change = p.changes + next * p.size;
      team.each(p.size, [&](int64_t i) {
        step[i] = p.trial[i] - p.x[i];
        change[i] = p.there[i] - p.gradient[i];
      });
      const double curved = lbfgs_dot(team, p.size, step, change);
      const double lengths = lbfgs_dot(team, p.size, step, step) * lbfgs_dot(team, p.size, change, change);
      if (curved > 0.0 && curved * curved > static_cast<double>(p.unit) * p.unit * lengths) {
        if (team.first()) p.pairs[next] = 1.0 / curved;
        now.newest = next;
        if (now.pairs < kHistory) ++now.pairs;
      }
    }
  }
  if (taken) {
    team.each(p.size, [&](int64_t i) {
      p.x[i] = p.trial[i];
      p.gradient[i] = p.there[i];
    });
    now.value = value;
    now.searched = 0;
    now.going = error > tol && now.stalled < kPatience;
  } else if (++now.searched > kSearches) {
    now.going = now.pairs > 0;  // the next try is along the gradient
    now.pairs = now.searched = 0;
    taken = true;
  }
  if (now.going) {
    if (taken) {
      lbfgs_direction(team, p, now);
      now.slope = lbfgs_dot(team, p.size, p.direction, p.gradient);
      // Without pairs the direction is the gradient: the first try goes a distance of 1.
      now.step = now.pairs > 0 ? 1.0 : 1.0 / static_cast<double>(::sqrtf(static_cast<float>(-now.slope) + 1e-30f));
      now.low = 0.0;
      now.high = infinity<double>();
    } else {
      now.step = now.high < infinity<double>() ? 0.5 * (now.low + now.high) : 2.0 * now.step;
    }
    const T step = static_cast<T>(now.step);
    team.each(p.size, [&](int64_t i) { p.trial[i] = p.x[i] + step * p.direction[i]; });
  }
  if (team.first()) *p.numbers = now;
}

}  // namespace tilewise
