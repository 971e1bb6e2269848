// Sinkhorn on the CPU for many problems of at most kSmall x kSmall: a lane of the vectors is a problem, which stops on
// its own while the others go on. The scheme is that of sinkhorn_cpu.cpp, factors of a K that is kept (in the cache),
// for the lanes together: where one drifts, all do that iteration in the log domain.
#pragma once

#include <new>
#include <utility>
#include <vector>

#include "common/simd.h"
#include "sinkhorn/sinkhorn_cpu.h"

namespace tilewise::TILEWISE_ISA {
namespace {  // of the one file that includes this: what is called once is inlined

constexpr int64_t kAsk = 16;  // iterations from one look for an interrupt to the next

template <typename T>
using Mask = decltype(Vector<T>{} < Vector<T>{});

template <typename T>
TILEWISE_FN bool any(Mask<T> mask) {
  typename std::remove_cvref_t<decltype(mask[0])> result = 0;
  for (int l = 0; l < kLanes<T>; ++l) result |= mask[l];
  return result != 0;
}

template <typename T>
TILEWISE_FN Vector<T> all(T value) {
  return Vector<T>{} + value;
}

template <typename T>
TILEWISE_FN Vector<T> each(Vector<T> x, T (*f)(T)) {
  for (int l = 0; l < kLanes<T>; ++l) x[l] = f(x[l]);
  return x;
}
template <typename T>
TILEWISE_FN Vector<T> log_of(Vector<T> x) {
  return each<T>(x, [](T value) { return std::log(value); });
}

template <typename T>
T cost_of(const Pairs<T>& pairs, int64_t index, int64_t i, int64_t j) {
  if (pairs.is_matrix())
    return pairs.matrix[index * pairs.batch_stride + i * pairs.row_stride + j * pairs.column_stride];
  const T* x = pairs.x + (index * pairs.rows + i) * pairs.features;
  const T* y = pairs.y + (index * pairs.columns + j) * pairs.features;
  return with_cost(pairs.cost, [&](auto cost) {
    T z = 0;
    if constexpr (!kIsMatrix<decltype(cost)>) {
      for (int64_t k = 0; k < pairs.features; ++k) z = cost.accumulate(z, x[k], y[k]);
      z = cost.finish(z);
    }
    return z;
  });
}

// Vectors of lanes, all in one allocation. (Not of the standard library: template arguments lose vector types.)
template <typename T>
class Lanes {
 public:
  explicit Lanes(int64_t count)
      : memory_(::operator new[](static_cast<size_t>(count) * kVectorBytes, std::align_val_t{kVectorBytes})),
        next_(static_cast<Vector<T>*>(memory_)) {}
  ~Lanes() { ::operator delete[](memory_, std::align_val_t{kVectorBytes}); }
  Lanes(const Lanes&) = delete;
  Lanes& operator=(const Lanes&) = delete;

  Vector<T>* take(int64_t count) { return std::exchange(next_, next_ + count); }

 private:
  void* memory_;
  Vector<T>* next_;
};

template <typename T>
class Group {
 public:
  using V = Vector<T>;

  static int64_t vectors(int64_t n, int64_t m) { return 2 * n * m + 8 * n + 9 * m; }

  Group(int64_t n, int64_t m, T rho_a, T rho_b, const Parallel& parallel)
      : n_(n), m_(m), rho_a_(rho_a), rho_b_(rho_b), parallel_(parallel), lanes_(vectors(n, m)) {
    cost_ = lanes_.take(n * m);
    kernel_ = lanes_.take(n * m);
    for (V** rows : {&a_, &f_, &u_, &next_u_, &s_, &next_f_, &row_lse_, &row_offset_}) *rows = lanes_.take(n);
    for (V** columns : {&b_, &g_, &v_, &next_v_, &c_, &next_g_, &column_lse_, &column_offset_, &mass_})
      *columns = lanes_.take(m);
  }

  // Problems [first, first + count); lanes beyond repeat the last.
  void load(const Pairs<T>& pairs, const T* a, const T* b, const T* epsilon, int64_t first, int64_t count) {
    for (int l = 0; l < kLanes<T>; ++l) {
      const int64_t index = first + (l < count ? l : count - 1);
      for (int64_t i = 0; i < n_; ++i) {
        for (int64_t j = 0; j < m_; ++j) cost_[i * m_ + j][l] = cost_of(pairs, index, i, j);
        a_[i][l] = a[index * n_ + i];
        f_[i][l] = T(0);
      }
      for (int64_t j = 0; j < m_; ++j) {
        b_[j][l] = b[index * m_ + j];
        g_[j][l] = T(0);
      }
      epsilon_[l] = epsilon[index];
    }
    now_ = epsilon_;
    step_ = all<T>(1);
    exact_ = true;
    factored_ = false;
    mass_of_rows_ = V{};
    for (int64_t i = 0; i < n_; ++i) mass_of_rows_ += a_[i];
  }

  void solve(const SinkhornCall<T>& call, int64_t first, int64_t count) {
    load(call.pairs, call.a, call.b, call.epsilon, first, count);
    Stage<T> stages[kLanes<T>];
    Schedule<T> schedules[kLanes<T>];
    for (int l = 0; l < kLanes<T>; ++l) {
      const int64_t index = first + (l < count ? l : count - 1);
      for (int64_t i = 0; i < n_; ++i) f_[i][l] = call.f[index * n_ + i];
      for (int64_t j = 0; j < m_; ++j) g_[j][l] = (call.symmetric ? call.f : call.g)[index * m_ + j];
      schedules[l] = {epsilon_[l], call.tol, call.scaling, call.max_iter, call.start != nullptr, call.symmetric};
      stages[l] = schedules[l].first(call.start != nullptr ? call.start[index] : epsilon_[l]);
    }
    symmetric_ = call.symmetric;
    Mask<T> going = epsilon_ == epsilon_;
    V n_iter = {};
    bool has_kernel = false;
    enter(stages);
    rescale(T(1) / now_);
    for (int64_t t = 0; t < call.max_iter; ++t) {
      if (t > 0 && call.start != nullptr) {
        const V before = now_;
        enter(stages);
        if (any<T>(now_ != before)) {
          absorb();
          rescale(before / now_);
          has_kernel = false;
        }
      }
      has_kernel = has_kernel && iterate();
      if (!has_kernel) {
        absorb();
        iterate_logs();
      }
      if (call.start == nullptr && t > 0) going &= ~(error_ <= call.tol);
      for (int l = 0; call.start != nullptr && l < kLanes<T>; ++l) {
        if (going[l] && schedules[l].stops(stages[l], error_[l], t)) going[l] = 0;
        if (going[l]) stages[l] = schedules[l].next(stages[l], error_[l], t);
      }
      if (!any<T>(going) || (t % kAsk == 0 && parallel_.interrupted())) break;
      n_iter += going ? all<T>(1) : V{};
      commit(going, has_kernel);
      if (!has_kernel) {
        form_kernel();
        has_kernel = true;
      }
    }
    if (any<T>(going)) {  // for the error alone
      if (any<T>(now_ != epsilon_)) {
        absorb();
        rescale(now_ / epsilon_);
        now_ = epsilon_;
        set_epsilon();
        has_kernel = false;
      }
      if (!(has_kernel && iterate())) {
        absorb();
        iterate_logs();
      }
    }
    if (symmetric_) update_columns_of_symmetric();
    absorb();
    rescale(now_);
    for (int l = 0; l < count; ++l) store(call, first + l, l, static_cast<int64_t>(n_iter[l]));
  }

  void unroll(const SinkhornUnrolled<T>& call, int64_t first, int64_t count);

 private:
  void set_epsilon() {
    factor_ = T(-1) / now_;
    damp_a_ = damp_b_ = all<T>(1);
    for (int l = 0; l < kLanes<T>; ++l) {
      damp_a_[l] = damping(rho_a_, now_[l]);
      damp_b_[l] = damping(rho_b_, now_[l]);
    }
  }

  // What the lanes do in this iteration.
  void enter(const Stage<T>* stages) {
    for (int l = 0; l < kLanes<T>; ++l) {
      now_[l] = stages[l].epsilon;
      step_[l] = symmetric_ ? T(0.5) : stages[l].step;
    }
    exact_ = !any<T>(step_ != T(1));
    set_epsilon();
  }

  // From potentials toward their updates, which are 0 without a pair.
  V moved(V potential, V lse, V damp) const {
    V updated = lse > -infinity<T>() ? -damp * lse : V{};
    if (!exact_)
      updated = (lse > -infinity<T>()) & (step_ != T(1)) ? potential + step_ * (updated - potential) : updated;
    return updated;
  }

  // The same of factors.
  V moved_factor(V factor, V updated) const {
    if (exact_) return updated;
    return step_ != T(1) ? factor * fast_exp(step_ * log_of<T>(updated / factor)) : updated;
  }

  // The rows' potentials or factors that the columns are updated from: averaged, the old.
  V seen_by_columns(V old, V next) const { return !exact_ ? (step_ < T(1) ? old : next) : next; }

  void rescale(V by) {
    for (int64_t i = 0; i < n_; ++i) f_[i] *= by;
    for (int64_t j = 0; j < m_; ++j) g_[j] *= by;
  }

  // log sum_j exp(factor c_j + offset_j) over `count` costs, `step` apart.
  V lse(const V* costs, int64_t step, const V* offset, int64_t count) const {
    V most = all<T>(-infinity<T>());
    for (int64_t j = 0; j < count; ++j) {
      const V score = factor_ * costs[j * step] + offset[j];
      most = score > most ? score : most;
    }
    const V top = most > -infinity<T>() ? most : V{};
    V sum = {};
    for (int64_t j = 0; j < count; ++j) sum += fast_exp(factor_ * costs[j * step] + offset[j] - top);
    return top + log_of<T>(sum);
  }

  V target(V f, T rho) const {
    V result = all<T>(1);
    if (!(rho < infinity<T>())) return result;
    for (int l = 0; l < kLanes<T>; ++l) result[l] = target_ratio(f[l], now_[l], rho);
    return result;
  }

  template <typename Ratio>
  void set_error(const Ratio& ratio) {
    V sum = {};
    for (int64_t i = 0; i < n_; ++i) {
      V difference = a_[i] * ratio(i);
      if (rho_a_ < infinity<T>()) {
        difference -= a_[i] * target(factored_ ? f_[i] + log_of<T>(u_[i]) : f_[i], rho_a_);
      } else {
        difference -= a_[i];
      }
      sum += difference < T(0) ? -difference : difference;
    }
    error_ = mass_of_rows_ > T(0) ? sum / mass_of_rows_ : V{};
  }

  // next_f_, next_g_ and the error of f_, g_.
  void iterate_logs() {
    for (int64_t j = 0; j < m_; ++j) column_offset_[j] = g_[j] + log_of<T>(b_[j]);
    for (int64_t i = 0; i < n_; ++i) row_lse_[i] = lse(cost_ + i * m_, 1, column_offset_, m_);
    set_error([&](int64_t i) { return each<T>(f_[i] + row_lse_[i], [](T x) { return std::exp(x); }); });
    for (int64_t i = 0; i < n_; ++i) {
      next_f_[i] = moved(f_[i], row_lse_[i], damp_a_);
      row_offset_[i] = seen_by_columns(f_[i], next_f_[i]) + log_of<T>(a_[i]);
    }
    for (int64_t j = 0; j < m_; ++j) {
      column_lse_[j] = symmetric_ ? row_lse_[j] : lse(cost_ + j, m_, row_offset_, n_);
      next_g_[j] = symmetric_ ? next_f_[j] : moved(g_[j], column_lse_[j], damp_b_);
    }
  }

  void commit(Mask<T> going, bool has_kernel) {
    for (int64_t i = 0; i < n_; ++i) {
      V& kept = has_kernel ? u_[i] : f_[i];
      kept = going ? (has_kernel ? next_u_ : next_f_)[i] : kept;
    }
    for (int64_t j = 0; j < m_; ++j) {
      V& kept = has_kernel ? v_[j] : g_[j];
      kept = going ? (has_kernel ? next_v_ : next_g_)[j] : kept;
    }
  }

  void form_kernel() {
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j < m_; ++j) kernel_[i * m_ + j] = fast_exp(factor_ * cost_[i * m_ + j] + (f_[i] + g_[j]));
      u_[i] = all<T>(1);
    }
    for (int64_t j = 0; j < m_; ++j) v_[j] = all<T>(1);
    factored_ = true;
  }

  // exp((d - 1) base) sum^-d, 1 for a row without a pair; `fine` where it and the sum are within bounds.
  V factor_of(V sum, V base, V damp, T rho, V lse, Mask<T>& fine) const {
    const T upper = std::exp(T(20)), lower = T(1) / upper;
    const Mask<T> dead = lse == -infinity<T>();
    V factor = T(1) / sum;
    if (rho < infinity<T>()) factor = fast_exp((damp - T(1)) * base - damp * log_of<T>(sum));
    fine &= dead | ((sum > lower) & (sum < upper) & (factor > lower) & (factor < upper));
    return dead ? all<T>(1) : factor;
  }

  bool iterate() { return exact_ && !symmetric_ ? iterate_as<true>() : iterate_as<false>(); }

  // next_u_, next_v_ and the error of u_, v_; false where a lane drifted. kPlain: whole steps between two sides.
  template <bool kPlain>
  bool iterate_as() {
    Mask<T> fine = epsilon_ == epsilon_;
    for (int64_t j = 0; j < m_; ++j) {
      mass_[j] = b_[j] * v_[j];
      c_[j] = V{};
    }
    for (int64_t i = 0; i < n_; ++i) {
      V sum = {};
      for (int64_t j = 0; j < m_; ++j) sum += kernel_[i * m_ + j] * mass_[j];
      s_[i] = sum;
      next_u_[i] = factor_of(sum, f_[i], damp_a_, rho_a_, row_lse_[i], fine);
      V seen = next_u_[i];
      if constexpr (!kPlain) {
        next_u_[i] = moved_factor(u_[i], next_u_[i]);
        if (symmetric_) continue;
        seen = seen_by_columns(u_[i], next_u_[i]);
      }
      const V weight = a_[i] * seen;
      for (int64_t j = 0; j < m_; ++j) c_[j] += kernel_[i * m_ + j] * weight;
    }
    set_error([&](int64_t i) { return u_[i] * s_[i]; });
    for (int64_t j = 0; j < m_; ++j) {
      if (!kPlain && symmetric_) {
        next_v_[j] = next_u_[j];
        continue;
      }
      const V factor = factor_of(c_[j], g_[j], damp_b_, rho_b_, column_lse_[j], fine);
      next_v_[j] = kPlain ? factor : moved_factor(v_[j], factor);
    }
    return !any<T>(~fine);
  }

  // g from f, of what the error came from.
  void update_columns_of_symmetric() {
    for (int64_t i = 0; i < n_; ++i) {
      if (factored_) v_[i] = next_u_[i] * next_u_[i] / u_[i];
      if (!factored_) g_[i] = row_lse_[i] > -infinity<T>() ? -damp_a_ * row_lse_[i] : V{};
    }
  }

  void absorb() {
    if (!factored_) return;
    for (int64_t i = 0; i < n_; ++i) f_[i] += log_of<T>(u_[i]);
    for (int64_t j = 0; j < m_; ++j) g_[j] += log_of<T>(v_[j]);
    factored_ = false;
  }

  void store(const SinkhornCall<T>& call, int64_t index, int l, int64_t n_iter) const {
    const double epsilon = epsilon_[l];
    double sum = 0, mass_a = 0, mass_b = 0, mass = 0;
    for (int64_t i = 0; i < n_; ++i) {
      call.f[index * n_ + i] = f_[i][l];
      sum += dual_term<T>(a_[i][l], f_[i][l], rho_a_);
      mass_a += a_[i][l];
    }
    for (int64_t j = 0; j < m_; ++j) {
      call.g[index * m_ + j] = g_[j][l];
      sum += dual_term<T>(b_[j][l], g_[j][l], rho_b_);
      mass_b += b_[j][l];
      mass += static_cast<double>(b_[j][l]) * target_ratio<T>(g_[j][l] / epsilon_[l], epsilon_[l], rho_b_);
    }
    call.value[index] = static_cast<T>(sum - epsilon * (mass - mass_a * mass_b));
    call.error[index] = error_[l];
    call.n_iter[index] = n_iter;
  }

  // What an iteration leaves for the way back: its factors, and the sums they came from or, where it was done in the
  // log domain, the potentials that K was then formed with.
  struct Step {
    V *u, *v, *s, *c;
    bool in_logs;
  };

  int64_t n_, m_;
  T rho_a_, rho_b_;
  const Parallel& parallel_;
  Lanes<T> lanes_;
  V *cost_, *kernel_;
  V *a_, *f_, *u_, *next_u_, *s_, *next_f_, *row_lse_, *row_offset_;
  V *b_, *g_, *v_, *next_v_, *c_, *next_g_, *column_lse_, *column_offset_, *mass_;
  V epsilon_, now_, factor_, damp_a_, damp_b_, error_, mass_of_rows_;
  V step_;             // how far updates go
  bool exact_ = true;  // 1 in all lanes
  bool symmetric_ = false;
  bool factored_ = false;
};

}  // namespace
}  // namespace tilewise::TILEWISE_ISA
