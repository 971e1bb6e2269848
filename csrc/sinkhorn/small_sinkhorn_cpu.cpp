// Many small problems on the CPU, for one instruction set: their solutions (small_group_cpu.h), and the way back
// through all iterations.
#include "sinkhorn/small_group_cpu.h"

namespace tilewise::TILEWISE_ISA {
namespace {

// The iterations again, and then back through them. In units of epsilon, with scores S = -C / eps and
//
//   g_j = -d log c_j, c_j = sum_i a_i exp(f_i + S_ij):   q_j = -d g_bar_j / c_j,   W_ij = a_i exp(f_i + S_ij) q_j
//   f_bar_i += sum_j W_ij,   S_bar += W,   a_bar_i += sum_j W_ij / a_i
//
// and the same for f. While K stands, exp(f + S) is K u; where f came from logs, the weights come from them, too.
template <typename T>
void Group<T>::unroll(const SinkhornUnrolled<T>& call, int64_t first, int64_t count) {
  load(call.pairs, call.a, call.b, call.epsilon, first, count);
  set_epsilon();
  Lanes<T> history(call.max_iter * 2 * (n_ + m_));
  std::vector<Step> steps(static_cast<size_t>(call.max_iter));
  std::vector<const Step*> bases;  // in the log domain
  for (Step& step : steps) {
    step = {history.take(n_), history.take(m_), history.take(n_), history.take(m_), !factored_ || !iterate()};
    if (step.in_logs) {
      absorb();
      iterate_logs();
    }
    commit(epsilon_ == epsilon_, !step.in_logs);
    if (step.in_logs) {
      form_kernel();
      bases.push_back(&step);
    }
    std::copy(u_, u_ + n_, step.u);
    std::copy(v_, v_ + m_, step.v);
    std::copy(step.in_logs ? f_ : s_, (step.in_logs ? f_ : s_) + n_, step.s);
    std::copy(step.in_logs ? g_ : c_, (step.in_logs ? g_ : c_) + m_, step.c);
  }

  Lanes<T> lanes(2 * (n_ * m_ + n_ + m_));
  V* score_bar = lanes.take(n_ * m_);
  V *f_bar = lanes.take(n_), *g_bar = lanes.take(m_), *a_bar = lanes.take(n_), *b_bar = lanes.take(m_);
  std::fill(score_bar, score_bar + n_ * m_, V{});
  std::fill(a_bar, a_bar + n_, V{});
  std::fill(b_bar, b_bar + m_, V{});
  V epsilon_bar = {};
  const auto upstream = [&](const T* gradient, int64_t size, int64_t i) {
    V result;
    for (int l = 0; l < kLanes<T>; ++l) result[l] = gradient[(first + (l < count ? l : count - 1)) * size + i];
    return result;
  };
  for (int64_t i = 0; i < n_; ++i) {
    f_bar[i] = epsilon_ * upstream(call.grad_f, n_, i);
    epsilon_bar += f_bar[i] / epsilon_ * (f_[i] + log_of<T>(u_[i]));
  }
  for (int64_t j = 0; j < m_; ++j) {
    g_bar[j] = epsilon_ * upstream(call.grad_g, m_, j);
    epsilon_bar += g_bar[j] / epsilon_ * (g_[j] + log_of<T>(v_[j]));
  }
  const bool free = rho_a_ < infinity<T>() || rho_b_ < infinity<T>();
  V slope_a = {}, slope_b = {};  // of log d in epsilon
  for (int l = 0; free && l < kLanes<T>; ++l) {
    if (rho_a_ < infinity<T>()) slope_a[l] = T(-1) / (rho_a_ + epsilon_[l]);
    if (rho_b_ < infinity<T>()) slope_b[l] = T(-1) / (rho_b_ + epsilon_[l]);
  }
  V* weight = row_offset_;
  V* pull = column_offset_;
  for (int64_t t = call.max_iter - 1; t >= 0; --t) {
    const Step& step = steps[static_cast<size_t>(t)];
    // g from f, always within the K of this step
    for (int64_t i = 0; i < n_; ++i) weight[i] = step.u[i];
    for (int64_t j = 0; j < m_; ++j) {
      V sum = {};
      if (step.in_logs) {
        for (int64_t i = 0; i < n_; ++i) sum += kernel_[i * m_ + j] * a_[i] * weight[i];
      } else {
        sum = step.c[j];
      }
      pull[j] = sum > T(0) ? -damp_b_ * g_bar[j] / sum : V{};
      if (free) epsilon_bar += g_bar[j] * (g_[j] + log_of<T>(step.v[j])) * slope_b;
      g_bar[j] = V{};
    }
    for (int64_t i = 0; i < n_; ++i) {
      V sum = {};
      for (int64_t j = 0; j < m_; ++j) {
        const V w = kernel_[i * m_ + j] * pull[j] * weight[i];
        sum += w;
        score_bar[i * m_ + j] += a_[i] * w;
      }
      a_bar[i] += sum;
      f_bar[i] += a_[i] * sum;
    }
    if (free) {
      for (int64_t i = 0; i < n_; ++i) epsilon_bar += f_bar[i] * (f_[i] + log_of<T>(step.u[i])) * slope_a;
    }
    // f from the g before
    const Step* before = t > 0 ? &steps[static_cast<size_t>(t - 1)] : nullptr;
    if (step.in_logs) {
      bases.pop_back();
      for (int64_t j = 0; j < m_; ++j) {
        g_[j] = before == nullptr ? V{} : bases.back()->c[j] + log_of<T>(before->v[j]);
        column_offset_[j] = g_[j] + log_of<T>(b_[j]);
      }
      for (int64_t i = 0; i < n_; ++i) {
        const V lse_of_row = lse(cost_ + i * m_, 1, column_offset_, m_);
        const V p = lse_of_row > -infinity<T>() ? -damp_a_ * f_bar[i] : V{};
        const V top = lse_of_row > -infinity<T>() ? lse_of_row : V{};
        for (int64_t j = 0; j < m_; ++j) {
          const V w = p * fast_exp(factor_ * cost_[i * m_ + j] + g_[j] - top);
          b_bar[j] += w;
          g_bar[j] += b_[j] * w;
          score_bar[i * m_ + j] += b_[j] * w;
        }
      }
      if (before != nullptr) {
        std::copy(bases.back()->s, bases.back()->s + n_, f_);
        std::copy(bases.back()->c, bases.back()->c + m_, g_);
        form_kernel();
      }
    } else {
      for (int64_t i = 0; i < n_; ++i) {
        const V p = step.s[i] > T(0) ? -damp_a_ * f_bar[i] / step.s[i] : V{};
        for (int64_t j = 0; j < m_; ++j) {
          const V w = p * kernel_[i * m_ + j] * before->v[j];
          b_bar[j] += w;
          g_bar[j] += b_[j] * w;
          score_bar[i * m_ + j] += b_[j] * w;
        }
      }
    }
    std::fill(f_bar, f_bar + n_, V{});
  }
  for (int64_t e = 0; e < n_ * m_; ++e) {
    score_bar[e] *= factor_;  // S = factor C
    epsilon_bar -= score_bar[e] != T(0) ? score_bar[e] * cost_[e] / epsilon_ : V{};
  }
  for (int l = 0; l < count; ++l) {
    const int64_t index = first + l;
    for (int64_t e = 0; e < n_ * m_; ++e) call.grad_cost[index * n_ * m_ + e] = score_bar[e][l];
    for (int64_t i = 0; i < n_; ++i) call.grad_a[index * n_ + i] = a_bar[i][l];
    for (int64_t j = 0; j < m_; ++j) call.grad_b[index * m_ + j] = b_bar[j][l];
    call.grad_epsilon[index] = epsilon_bar[l];
  }
}

template <typename Call, typename T>
void each_group(const Call& call, int64_t begin, int64_t end, const Parallel& parallel,
                void (Group<T>::*run)(const Call&, int64_t, int64_t)) {
  Group<T> group(call.pairs.rows, call.pairs.columns, call.rho_a, call.rho_b, parallel);
  for (int64_t index = begin; index < end && !parallel.interrupted(); ++index) {
    const int64_t first = index * kLanes<T>;
    const int64_t left = call.pairs.batch - first;
    (group.*run)(call, first, left < kLanes<T> ? left : kLanes<T>);
  }
}

template <typename T>
void solve(const SinkhornCall<T>& call, int64_t begin, int64_t end, const Parallel& parallel) {
  each_group<SinkhornCall<T>, T>(call, begin, end, parallel, &Group<T>::solve);
}

template <typename T>
void unroll(const SinkhornUnrolled<T>& call, int64_t begin, int64_t end, const Parallel& parallel) {
  each_group<SinkhornUnrolled<T>, T>(call, begin, end, parallel, &Group<T>::unroll);
}

template <typename T>
constexpr SmallSinkhornKernels<T> kernels{kLanes<T>, solve<T>, unroll<T>};

}  // namespace

extern const ForTypes<SmallSinkhornKernels> small_sinkhorn_kernels{kernels<float>, kernels<double>};

}  // namespace tilewise::TILEWISE_ISA
