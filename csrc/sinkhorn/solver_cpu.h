// Sinkhorn's iterations of one problem on the CPU, for one instruction set.
//
// In the log domain an iteration forms every score twice and takes an exponential of each. Where there is room for it,
// K = exp((f0 + g0 - C) / eps) is kept instead and the potentials move as factors u = exp((f - f0) / eps) and v:
//
//   s_i = sum_j K_ij b_j v_j,  u_i = s_i^-d exp((d - 1) f0_i / eps),  c_j = sum_i K_ij a_i u_i,  v_j likewise
//
// in one pass over K. A factor, s or c beyond exp(+-kDrift) ends that: the iteration is done again in the log domain
// and K is formed anew, so that nothing that K rounded to 0 is ever missed.
#pragma once

#include <atomic>

#include "sinkhorn/pairs_cpu.h"

namespace tilewise::TILEWISE_ISA {
namespace {  // of the one file that includes this: what is called once is inlined

constexpr double kDrift = 20.0;
constexpr int64_t kSerial = 1 << 15;  // pairs of a pass that are not worth a second thread

// out_j = potential_j + log marginal_j - s_j, -inf in the padding; no marginal: ones.
template <typename T>
void fill_offset(const View<T>& view, const Side<T>& side, const T* potential, const T* marginal, T epsilon, T* out) {
  for (int64_t i = 0; i < side.count; ++i) {
    const T log_marginal = marginal == nullptr ? T(0) : std::log(marginal[i]);
    out[i] = potential[i] + log_marginal - view.shift(side, i, epsilon);
  }
  for (int64_t i = side.count; i < padded(side.count); ++i) out[i] = -infinity<T>();
}

// f(j, vector of z) over a row's block; the last vector is filled up with zeros.
template <typename T, typename Function>
TILEWISE_FN void for_vectors(const T* z, int64_t columns, const Function& f) {
  int64_t j = 0;
  for (; j + kLanes<T> <= columns; j += kLanes<T>) f(j, load_vector(z + j));
  if (j < columns) f(j, load_some(z + j, columns - j));
}

// log sum_j exp(factor z_ij + offset_j) of the rows [begin, end).
template <typename T>
void row_lse(const View<T>& view, T factor, const T* offset, int64_t begin, int64_t end, T* out) {
  alignas(kVectorBytes) T tile[kTileRows * kTileColumns];
  alignas(kVectorBytes) T line[kTileColumns];
  T max[kTileRows], sum[kTileRows];
  const auto block = [&](int64_t row, int64_t column, int64_t columns, const T* z) {
    const int64_t i = (row - begin) % kTileRows;
    if (column == 0) {
      max[i] = -infinity<T>();
      sum[i] = T(0);
    }
    Vector<T> most = Vector<T>{} + -infinity<T>();
    for_vectors(z, columns, [&](int64_t j, Vector<T> value) {
      value = factor * value + load_vector(offset + column + j);
      most = value > most ? value : most;
      store_vector(value, line + j);
    });
    const T here = largest<T>(most);
    const T top = here > max[i] ? here : max[i];
    if (!(top > -infinity<T>())) return;
    Vector<T> sums = {};
    for (int64_t j = 0; j < columns; j += kLanes<T>) sums += fast_exp(load_vector(line + j) - top);
    sum[i] = sum[i] * fast_exp(max[i] - top) + total<T>(sums);
    max[i] = top;
  };
  for_tiles(view, begin, end, tile, block, [&](int64_t row, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) out[row + i] = sum[i] > T(0) ? max[i] + std::log(sum[i]) : -infinity<T>();
  });
}

template <typename T>
class Solver {
 public:
  Solver(const SinkhornCall<T>& call, int64_t index, T* scratch, const Parallel& parallel)
      : call_(call),
        view_(view_of(call.pairs, index, scratch)),
        flipped_(view_.transposed()),
        parallel_(parallel),
        n_(call.pairs.rows),
        m_(call.pairs.columns),
        wide_(padded(m_)),
        shares_(column_shares(n_)),
        a_(call.a + index * n_),
        b_(call.b + index * m_),
        f_(call.f + index * n_),
        g_(call.g + index * m_),
        epsilon_(call.epsilon[index]),
        start_(call.start == nullptr ? nullptr : call.start + index) {
    const auto take = [&](int64_t count) { return std::exchange(scratch, scratch + count); };
    for (T** rows : {&row_offset_, &row_lse_, &u_, &next_u_}) *rows = take(padded(n_));
    for (T** columns : {&column_offset_, &column_lse_, &v_, &next_v_, &mass_}) *columns = take(wide_);
    partial_ = take(shares_ * wide_);
    if (keeps_kernel(call.pairs)) kernel_ = take(n_ * wide_);
    for (int64_t i = 0; i < n_; ++i) mass_of_rows_ += a_[i];
  }

  void solve(int64_t index) {
    if (call_.symmetric) std::copy(f_, f_ + n_, g_);
    const Schedule<T> schedule{epsilon_, call_.tol, call_.scaling, call_.max_iter, start_ != nullptr, call_.symmetric};
    Stage<T> stage = schedule.first(start_ != nullptr ? *start_ : epsilon_);
    now_ = stage.epsilon;
    rescale(T(1) / now_);
    bool has_kernel = false, stopped = false;
    int64_t t = 0;
    for (; t < call_.max_iter && !parallel_.interrupted(); ++t) {
      if (stage.epsilon != now_) {
        if (std::exchange(has_kernel, false)) absorb();
        change_epsilon(stage.epsilon);
      }
      stage_ = stage;
      const auto may_go_on = [&] {
        stopped = schedule.stops(stage_, static_cast<T>(error_), t);
        stage = schedule.next(stage_, static_cast<T>(error_), t);
        return !stopped;
      };
      if (!has_kernel || !iterate(may_go_on)) {
        if (has_kernel) absorb();
        iterate_logs(may_go_on);
        has_kernel = kernel_ != nullptr && !stopped && stage.epsilon == now_ && t + 1 < call_.max_iter;
        if (has_kernel) form_kernel();
      }
      if (stopped) break;
    }
    if (!stopped) measure(has_kernel);
    if (call_.symmetric) update_columns_of_symmetric();
    if (has_kernel) absorb();
    rescale(now_);
    call_.n_iter[index] = t;
    call_.error[index] = static_cast<T>(error_);
    call_.value[index] = static_cast<T>(value());
  }

 private:
  void rescale(T by) {
    for (int64_t i = 0; i < n_; ++i) f_[i] *= by;
    for (int64_t j = 0; j < m_; ++j) g_[j] *= by;
  }

  void change_epsilon(T next) {
    rescale(now_ / next);
    now_ = next;
  }

  // From a potential toward its update, which is 0 without a pair.
  T moved(T potential, T lse, T damp) const {
    if (!(lse > -infinity<T>())) return T(0);
    const T updated = -damp * lse, step = call_.symmetric ? T(0.5) : stage_.step;
    return step == T(1) ? updated : potential + step * (updated - potential);
  }

  // The same of a factor.
  T moved_factor(T factor, T updated) const {
    if (call_.symmetric || stage_.averages()) return std::sqrt(factor * updated);
    return stage_.step == T(1) ? updated : factor * std::pow(updated / factor, stage_.step);
  }

  void in_parallel(int64_t count, const std::function<void(int64_t, int64_t)>& f) const {
    if (n_ * m_ < kSerial) return f(0, count);
    parallel_(count, f);
  }

  void lse(const View<T>& view, const T* offset, T* out) const {
    const int64_t rows = view.x.count;
    in_parallel((rows + kTileRows - 1) / kTileRows, [&](int64_t begin, int64_t end) {
      const int64_t last = end * kTileRows < rows ? end * kTileRows : rows;
      row_lse(view, view.factor(now_), offset, begin * kTileRows, last, out);
      for (int64_t i = begin * kTileRows; i < last; ++i) out[i] -= view.shift(view.x, i, now_);
    });
  }

  void lse_of_rows() {
    fill_offset(view_, view_.y, g_, b_, now_, column_offset_);
    lse(view_, column_offset_, row_lse_);
  }

  // From (P 1)_i / a_i of every row.
  template <typename Ratio>
  void set_error(const Ratio& ratio) {
    const bool free = call_.rho_a < infinity<T>();
    double sum = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const T target = free ? target_ratio(factored_ ? f_[i] + std::log(u_[i]) : f_[i], now_, call_.rho_a) : T(1);
      sum += static_cast<double>(a_[i]) * std::fabs(ratio(i) - target);
    }
    error_ = mass_of_rows_ > 0 ? sum / mass_of_rows_ : 0;
  }

  template <typename MayGoOn>
  void iterate_logs(const MayGoOn& may_go_on) {
    factored_ = false;
    lse_of_rows();
    set_error([&](int64_t i) { return std::exp(static_cast<double>(f_[i]) + row_lse_[i]); });
    if (!may_go_on()) return;
    const T damp_a = damping(call_.rho_a, now_), damp_b = damping(call_.rho_b, now_);
    if (stage_.averages()) fill_offset(flipped_, flipped_.y, f_, a_, now_, row_offset_);
    for (int64_t i = 0; i < n_; ++i) f_[i] = moved(f_[i], row_lse_[i], damp_a);
    if (call_.symmetric) {
      std::copy(f_, f_ + n_, g_);
      return;
    }
    if (!stage_.averages()) fill_offset(flipped_, flipped_.y, f_, a_, now_, row_offset_);
    lse(flipped_, row_offset_, column_lse_);
    for (int64_t j = 0; j < m_; ++j) g_[j] = moved(g_[j], column_lse_[j], damp_b);
  }

  void form_kernel() {
    fill_offset(view_, view_.x, f_, static_cast<const T*>(nullptr), now_, row_offset_);
    fill_offset(view_, view_.y, g_, static_cast<const T*>(nullptr), now_, column_offset_);
    const T factor = view_.factor(now_);
    in_parallel((n_ + kTileRows - 1) / kTileRows, [&](int64_t begin, int64_t end) {
      alignas(kVectorBytes) T tile[kTileRows * kTileColumns];
      const auto block = [&](int64_t row, int64_t column, int64_t columns, const T* z) {
        T* out = kernel_ + row * wide_ + column;
        const T offset = row_offset_[row];
        for_vectors(z, columns, [&](int64_t j, Vector<T> value) {
          store_vector(fast_exp(factor * value + (load_vector(column_offset_ + column + j) + offset)), out + j);
        });
        const int64_t filled = column + (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
        if (column + columns == m_) std::fill(kernel_ + row * wide_ + filled, kernel_ + (row + 1) * wide_, T(0));
      };
      for_tiles(view_, begin * kTileRows, end * kTileRows < n_ ? end * kTileRows : n_, tile, block,
                [](int64_t, int64_t) {});
    });
    std::fill(u_, u_ + n_, T(1));
    std::fill(v_, v_ + m_, T(1));
    fill_mass();
    factored_ = true;
  }

  void fill_mass() {
    for (int64_t j = 0; j < m_; ++j) mass_[j] = b_[j] * v_[j];
    std::fill(mass_ + m_, mass_ + wide_, T(0));
  }

  // The factor that sums of K ask for; false beyond the bounds. `dead`: a row or column without a pair.
  bool factor_of(T sum, T base, T damp, bool dead, T& out) const {
    if (dead) {
      out = T(1);
      return true;
    }
    static const T upper = static_cast<T>(std::exp(kDrift)), lower = T(1) / upper;
    if (!(sum > lower && sum < upper)) return false;
    out = damp == T(1) ? T(1) / sum : std::exp((damp - T(1)) * base - damp * std::log(sum));
    return out > lower && out < upper;
  }

  // s of kRows rows beside each other, which become their factors, and what they add to the columns. That second
  // loop finds its rows in the first-level cache, and meanwhile asks for the next ones: the first would wait for
  // memory.
  template <int kRows>
  bool pass_rows(int64_t row, T damp, bool columns, T* sums) {
    const T* k = kernel_ + row * wide_;
    Vector<T> s[kRows] = {};
    for (int64_t j = 0; j < wide_; j += kLanes<T>) {
      const Vector<T> mass = load_vector(mass_ + j);
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) s[i] += mass * load_vector(k + i * wide_ + j);
    }
    T weight[kRows];
    bool fine = true;
    for (int i = 0; i < kRows; ++i) {
      T& u = next_u_[row + i];
      const T sum = total<T>(s[i]);
      ratio_of(row + i) = u_[row + i] * sum;
      fine = factor_of(sum, f_[row + i], damp, row_lse_[row + i] == -infinity<T>(), u) && fine;
      u = moved_factor(u_[row + i], u);
      weight[i] = a_[row + i] * (stage_.averages() ? u_[row + i] : u);
    }
    if (!fine || !columns) return fine;
    for (int64_t j = 0; j < wide_; j += kLanes<T>) {
      Vector<T> sum = load_vector(sums + j);
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        sum += weight[i] * load_vector(k + i * wide_ + j);
        __builtin_prefetch(k + (kRows + i) * wide_ + j, 0, 2);
      }
      store_vector(sum, sums + j);
    }
    return true;
  }
  T& ratio_of(int64_t i) { return row_offset_[i]; }  // the offsets have done their work when K is formed

  // next_u_, ratios and the partial sums over columns; false if a row drifted.
  bool pass(bool columns) {
    const T damp = damping(call_.rho_a, now_);
    std::atomic<bool> fine{true};
    in_parallel(shares_, [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end && fine.load(std::memory_order_relaxed); ++share) {
        T* sums = partial_ + share * wide_;
        std::fill(sums, sums + wide_, T(0));
        const int64_t last = n_ * (share + 1) / shares_;
        int64_t row = n_ * share / shares_;
        bool here = true;
        for (; here && row + 2 <= last; row += 2) here = pass_rows<2>(row, damp, columns, sums);
        for (; here && row < last; ++row) here = pass_rows<1>(row, damp, columns, sums);
        if (!here) fine.store(false, std::memory_order_relaxed);
      }
    });
    return fine.load();
  }

  // False where a factor drifted: nothing is changed then.
  template <typename MayGoOn>
  bool iterate(const MayGoOn& may_go_on) {
    if (!pass(!call_.symmetric)) return false;
    set_error([&](int64_t i) { return static_cast<double>(ratio_of(i)); });
    if (!may_go_on()) return true;
    if (call_.symmetric) {
      std::swap(u_, next_u_);
      std::copy(u_, u_ + n_, v_);
    } else {
      const T damp = damping(call_.rho_b, now_);
      bool fine = true;
      for (int64_t j = 0; j < wide_; j += kLanes<T>) {
        Vector<T> sum = load_vector(partial_ + j);
        for (int64_t share = 1; share < shares_; ++share) sum += load_vector(partial_ + share * wide_ + j);
        store_vector(sum, partial_ + j);
      }
      for (int64_t j = 0; fine && j < m_; ++j) {
        fine = factor_of(partial_[j], g_[j], damp, column_lse_[j] == -infinity<T>(), next_v_[j]);
        next_v_[j] = moved_factor(v_[j], next_v_[j]);
      }
      if (!fine) return false;
      std::swap(u_, next_u_);
      std::swap(v_, next_v_);
    }
    fill_mass();
    return true;
  }

  // The error of the potentials as they are.
  void measure(bool has_kernel) {
    if (has_kernel && now_ == epsilon_ && pass(false))
      return set_error([&](int64_t i) { return static_cast<double>(ratio_of(i)); });
    if (has_kernel) absorb();
    if (now_ != epsilon_) change_epsilon(epsilon_);
    lse_of_rows();
    set_error([&](int64_t i) { return std::exp(static_cast<double>(f_[i]) + row_lse_[i]); });
  }

  // g from f, of what the error came from.
  void update_columns_of_symmetric() {
    const T damp = damping(call_.rho_a, now_);
    for (int64_t i = 0; i < n_; ++i) {
      if (factored_) v_[i] = next_u_[i] * next_u_[i] / u_[i];
      if (!factored_) g_[i] = row_lse_[i] > -infinity<T>() ? -damp * row_lse_[i] : T(0);
    }
  }

  // The factors enter the potentials.
  void absorb() {
    if (!factored_) return;
    for (int64_t i = 0; i < n_; ++i) f_[i] += std::log(u_[i]);
    for (int64_t j = 0; j < m_; ++j) g_[j] += std::log(v_[j]);
    factored_ = false;
  }

  double value() const {
    double sum = 0, mass_a = 0, mass_b = 0, mass = 0;
    for (int64_t i = 0; i < n_; ++i) {
      sum += dual_term(a_[i], f_[i], call_.rho_a);
      mass_a += a_[i];
    }
    for (int64_t j = 0; j < m_; ++j) {
      sum += dual_term(b_[j], g_[j], call_.rho_b);
      mass_b += b_[j];
      mass += static_cast<double>(b_[j]) * target_ratio(g_[j] / epsilon_, epsilon_, call_.rho_b);
    }
    return sum - epsilon_ * (mass - mass_a * mass_b);
  }

  const SinkhornCall<T>& call_;
  View<T> view_, flipped_;
  const Parallel& parallel_;
  int64_t n_, m_, wide_, shares_;
  const T *a_, *b_;
  T *f_, *g_;  // in units of now_, once solve() has begun
  T epsilon_;
  const T* start_;
  T now_ = 0;
  Stage<T> stage_{};  // of this iteration
  T *row_offset_, *row_lse_, *u_, *next_u_;
  T *column_offset_, *column_lse_, *v_, *next_v_, *mass_;
  T* partial_;           // (shares, columns)
  T* kernel_ = nullptr;  // (rows, columns)
  bool factored_ = false;
  double mass_of_rows_ = 0;
  double error_ = 0;
};

}  // namespace
}  // namespace tilewise::TILEWISE_ISA
