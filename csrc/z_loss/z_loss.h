// The spherical family (de Brebisson & Vincent 2016): losses that see a row o only through the target logit
// o_c and the row's mean mu and variance M2 / D. Each member writes the coefficients of its gradient, so one
// backward serves all:
//
//   dL/do_k = kappa + lambda (o_k - mu) + gamma 1[k = c]
//
//   z_loss     L = softplus(a (b - z)) / a,  z = (o_c - mu) / sd
//   taylor     L = log Z - log n,  n = 1 + o_c + o_c^2 / 2,  Z = sum_k of the same
//   spherical  L = log Z - log n,  n = o_c^2 + eps,          Z = sum_k of the same
//
// Of large logits the squares overflow where L and its gradient do not: then the moments come in smaller units
// (MomentStats::scale), and the row state keeps lambda as the root r of its size, with its sign: lambda = r |r|.
#pragma once

#include <type_traits>

#include "common/isa.h"
#include "rows/rows.h"

namespace tilewise {

template <typename T>
struct SphericalForward {
  RowMatrix logits;
  int32_t member = 0;  // its place in SphericalFamily
  T a = 0;             // constants of the member
  T b = 0;
  const int64_t* target = nullptr;  // (rows,)
  int64_t ignore_index = -100;
  T* loss_rows = nullptr;   // (rows,)
  T* share_rows = nullptr;  // (rows,) 1 for kept rows, 0 for ignored
  T* row_state = nullptr;   // (4, rows): mu, gamma, r, kappa
  RowParts parts;
};

template <typename T>
struct SphericalBackward {
  RowMatrix logits;
  RowMatrix gradient;
  Transform<T> transform;  // identity: the engine's interface
  DenseTarget<T> dense;    // empty
  const int64_t* target = nullptr;
  int64_t ignore_index = -100;
  Upstream<T> upstream;
  const T* row_state = nullptr;
};

// Loss of one row and the coefficients of its gradient.
template <typename T>
struct SphericalRow {
  T loss = 0;
  T gamma = 0;
  T root = 0;
  T kappa = 0;
};

// L and its coefficients where n = o^2 + c and Z = sum_k (o_k^2 + c), o the logits less an offset.
template <typename T>
TILEWISE_FN SphericalRow<T> square_row(MomentStats<T> stats, T o, T c) {
  if (!(::fabs(stats.mean) < MomentRange<T>::most)) shrink(stats);
  const T near = o * stats.scale;
  const T n = near * near + c * stats.scale * stats.scale;
  const T total = stats.m2 + stats.count * (stats.mean * stats.mean + c * stats.scale * stats.scale);
  // In these units n may vanish.
  const T loss = stats.scale == T(1) || n > MomentRange<T>::scale
                     ? natural_log(total / n)
                     : natural_log(total) - T(2) * natural_log(stats.scale) - natural_log(o * o + c);
  const T norm = ::sqrt(total);
  const T rate = stats.scale / norm;  // 1 / sqrt(Z)
  return {loss, T(-2) / (o + c / o), T(1.41421356237309505) * rate, T(2) * (stats.mean / norm) * rate};
}

// The members: a name, and the loss of a row with the coefficients of its gradient.
struct ZLoss {
  static constexpr const char* kName = "z_loss";

  template <typename T>
  static TILEWISE_METHOD SphericalRow<T> row(const MomentStats<T>& stats, T target_logit, T a, T b) {
    const T sd = ::sqrt(stats.m2 / stats.count);
    if (sd == T(0)) return {softplus(a * b) / a, T(0), T(0), T(0)};
    const T z = (target_logit * stats.scale - stats.mean) / sd;
    const T s = sigmoid(a * (b - z));
    const T rate = stats.scale / sd;
    const T root = ::sqrt(s * ::fabs(z) / stats.count) * rate;
    return {softplus(a * (b - z)) / a, -s * rate, z < T(0) ? -root : root, s / stats.count * rate};
  }
};

// 1 + o + o^2 / 2 is ((1 + o)^2 + 1) / 2
struct TaylorSoftmax {
  static constexpr const char* kName = "taylor_softmax_loss";

  template <typename T>
  static TILEWISE_METHOD SphericalRow<T> row(MomentStats<T> stats, T target_logit, T, T) {
    stats.mean += stats.scale;
    return square_row(stats, T(1) + target_logit, T(1));
  }
};

struct SphericalSoftmax {
  static constexpr const char* kName = "spherical_softmax_loss";

  template <typename T>
  static TILEWISE_METHOD SphericalRow<T> row(const MomentStats<T>& stats, T target_logit, T eps, T) {
    return square_row(stats, target_logit, eps);
  }
};

template <typename... Members>
struct Family {
  template <typename Member>
  static constexpr int32_t place_of() {
    static_assert((std::is_same_v<Member, Members> || ...), "not a member");
    int32_t place = 0;
    ((std::is_same_v<Member, Members> || (++place, false)) || ...);
    return place;
  }

  template <typename T>
  static TILEWISE_METHOD SphericalRow<T> row(int32_t member, const MomentStats<T>& stats, T target_logit, T a, T b) {
    SphericalRow<T> result{quiet_nan<T>(), quiet_nan<T>(), quiet_nan<T>(), quiet_nan<T>()};
    int32_t place = 0;
    ((member == place++ && (result = Members::row(stats, target_logit, a, b), true)) || ...);
    return result;
  }
};
using SphericalFamily = Family<ZLoss, TaylorSoftmax, SphericalSoftmax>;

template <typename T>
TILEWISE_FN void write_row(const SphericalForward<T>& op, int64_t row, T share, T mu, const SphericalRow<T>& result) {
  op.loss_rows[row] = result.loss;
  op.share_rows[row] = share;
  op.row_state[row] = mu;
  op.row_state[op.logits.rows + row] = result.gamma;
  op.row_state[2 * op.logits.rows + row] = result.root;
  op.row_state[3 * op.logits.rows + row] = result.kappa;
}

template <typename T>
TILEWISE_FN bool skip_row(const SphericalForward<T>& op, int64_t row, bool writes) {
  if (op.target[row] != op.ignore_index) return false;
  if (writes) write_row(op, row, T(0), T(0), SphericalRow<T>{});
  return true;
}

template <typename T>
TILEWISE_FN void finish_row(const SphericalForward<T>& op, int64_t row, const MomentStats<T>& stats) {
  const int64_t y = op.target[row];
  if (y < 0 || y >= op.logits.columns) {
    const T nan = quiet_nan<T>();
    write_row(op, row, T(1), nan, SphericalRow<T>{nan, nan, nan, nan});
    return;
  }
  const T target_logit = read_element<T>(op.logits, row, y);
  write_row(op, row, T(1), stats.mean / stats.scale, SphericalFamily::row(op.member, stats, target_logit, op.a, op.b));
}

template <typename T>
TILEWISE_FN RowGradient<T> gradient_of_row(const SphericalBackward<T>& op, int64_t row) {
  RowGradient<T> result;
  const int64_t y = op.target[row];
  const T g = y == op.ignore_index ? T(0) : upstream_of_row(op.upstream, row);
  result.zero = g == T(0);
  if (result.zero) return result;
  result.mean = op.row_state[row];
  result.gamma = g * op.row_state[op.logits.rows + row];
  const T root = op.row_state[2 * op.logits.rows + row];
  result.lambda = g * root;
  result.rate = ::fabs(root);
  result.kappa = g * op.row_state[3 * op.logits.rows + row];
  result.target = y >= 0 && y < op.logits.columns ? y : -1;
  return result;
}

template <typename T>
struct ZLossKernels {
  void (*forward)(const SphericalForward<T>&, int64_t begin, int64_t end);
  void (*backward)(const SphericalBackward<T>&, int64_t begin, int64_t end);
};
TILEWISE_DECLARE_KERNELS(ForTypes<ZLossKernels>, z_loss_kernels)

// Both return a CUDA error string, or null.
const char* z_loss_forward_cuda(const SphericalForward<float>& op, const RowReduction<float>& reduction, void* stream);
const char* z_loss_backward_cuda(const SphericalBackward<float>& op, void* stream);

}  // namespace tilewise
