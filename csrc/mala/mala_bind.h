// The arguments of a call of mala, checked, and its sums as tensors (host only).
#pragma once

#include <algorithm>

#include "common/checks.h"

namespace tilewise {

inline constexpr int64_t kMaxFeatures = 1024;  // of a GPU's shared memory

struct Attention {
  static constexpr const char* kOp = "mala";

  const Tensor& q;  // (B, H, N, D)
  const Tensor& k;  // (B, Hk, M, D)
  const Tensor& v;  // (B, Hk, M, Dv)
  const std::optional<Tensor>& cos;
  const std::optional<Tensor>& sin;
  const std::optional<Tensor>& q_bounds;  // (sequences + 1,) int64, B = 1: where each begins; null: B sequences
  const std::optional<Tensor>& k_bounds;
  bool causal;
  double scale;
  double eps;
  int64_t seen;

  int64_t sequences() const { return q_bounds.has_value() ? q_bounds->numel() - 1 : q.size(0); }
  int64_t heads() const { return q.size(1); }
  int64_t key_heads() const { return k.size(1); }
  int64_t group() const { return heads() / std::max<int64_t>(1, key_heads()); }
};

inline void check_tokens(const Tensor& tensor, const Tensor& like, const char* name) {
  require(tensor.dim() == 4, Attention::kOp, "expected ", name, " to have shape (batch, heads, tokens, features), got ",
          shape_of(tensor));
  require_dtype(tensor, like.scalar_type(), Attention::kOp, name);
  require(tensor.stride(3) == 1 || tensor.size(3) <= 1 || tensor.numel() == 0, Attention::kOp,
          "expected the features of ", name, " to lie side by side, got stride ", tensor.stride(3));
}

inline void check_bounds(const std::optional<Tensor>& bounds, const Tensor& tokens, const char* name) {
  if (!bounds.has_value()) return;
  require(tokens.size(0) == 1, Attention::kOp, "expected a batch of 1 with packed sequences, got ", tokens.size(0));
  require_dtype(*bounds, ScalarType::Long, Attention::kOp, name);
  require(bounds->dim() == 1 && bounds->numel() >= 1 && bounds->is_contiguous(), Attention::kOp, "expected ", name,
          " to have shape (sequences + 1,), got ", shape_of(*bounds));
  if constexpr (kOnGpu) return;  // looking would synchronise; kernels stay within the tokens
  const int64_t* at = static_cast<const int64_t*>(bounds->data_ptr());
  require(at[0] == 0 && at[bounds->numel() - 1] == tokens.size(2), Attention::kOp, "expected ", name,
          " to run from 0 to ", tokens.size(2), ", got ", at[0], " to ", at[bounds->numel() - 1]);
  for (int64_t i = 1; i < bounds->numel(); ++i)
    require(at[i - 1] <= at[i], Attention::kOp, "expected ", name, " not to decrease, got ", at[i - 1], " before ",
            at[i]);
}

inline void check(const Attention& attention) {
  const Tensor& q = attention.q;
  const bool narrow = q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half;
  const bool wide = q.scalar_type() == ScalarType::Double;
  require(q.scalar_type() == ScalarType::Float || (kOnGpu ? narrow : wide), Attention::kOp, "expected q to be ",
          kOnGpu ? "float32, bfloat16 or float16 on a GPU" : "float32 or float64 on a CPU", ", got ",
          toString(q.scalar_type()));
  require(!kOnGpu || q.size(3) <= kMaxFeatures, Attention::kOp, "expected at most ", kMaxFeatures,
          " features on a GPU, got ", q.size(3));
  check_tokens(q, q, "q");
  check_tokens(attention.k, q, "k");
  check_tokens(attention.v, q, "v");
  const Tensor& k = attention.k;
  require_shape(k, {q.size(0), k.size(1), k.size(2), q.size(3)}, Attention::kOp, "k");
  require_shape(attention.v, {k.size(0), k.size(1), k.size(2), attention.v.size(3)}, Attention::kOp, "v");
  require(k.size(1) >= 1 && q.size(1) >= 1 && q.size(1) % k.size(1) == 0, Attention::kOp,
          "expected the heads of q to be a multiple of those of k, at least one each, got ", q.size(1), " and ",
          k.size(1));
  check_bounds(attention.q_bounds, q, "q_bounds");
  check_bounds(attention.k_bounds, k, "k_bounds");
  require(attention.q_bounds.has_value() == attention.k_bounds.has_value(), Attention::kOp,
          "expected q_bounds and k_bounds together, got one of them");
  if (attention.q_bounds.has_value())
    require_shape(*attention.k_bounds, {attention.q_bounds->numel()}, Attention::kOp, "k_bounds");
  if (!kOnGpu && attention.causal && attention.q_bounds.has_value()) {
    const int64_t* q_at = static_cast<const int64_t*>(attention.q_bounds->data_ptr());
    const int64_t* k_at = static_cast<const int64_t*>(attention.k_bounds->data_ptr());
    require(std::equal(q_at, q_at + attention.q_bounds->numel(), k_at), Attention::kOp,
            "expected q_bounds and k_bounds to be equal when causal, got different ones");
  }
  require(!attention.causal || q.size(2) == k.size(2), Attention::kOp,
          "expected as many queries as keys when causal, got ", q.size(2), " and ", k.size(2));
  require(attention.seen >= 0 && attention.seen < int64_t{1} << 62, Attention::kOp,
          "expected the keys seen before to be a count below 2^62, got ", attention.seen);
  require(attention.cos.has_value() == attention.sin.has_value(), Attention::kOp,
          "expected cos and sin together, got one of them");
  if (!attention.cos.has_value()) return;
  for (const Tensor* angle : {&*attention.cos, &*attention.sin}) {
    require(q.size(3) % 2 == 0, Attention::kOp, "expected an even number of features to rotate, got ", q.size(3));
    require_shape(*angle, {std::max(q.size(2), k.size(2)), q.size(3) / 2}, Attention::kOp, "cos and sin");
    require_dtype(*angle, statistics_type(q), Attention::kOp, "cos and sin");
    require(angle->is_contiguous(), Attention::kOp, "expected cos and sin to be contiguous");
  }
}

// The sums of all keys of every sequence and key head, S (sequences, Hk, D, Dv), Z (.., D), U (.., Dv).
struct Sums {
  Tensor s, z, u;
};

inline Sums new_sums(const Attention& attention) {
  const int64_t n = attention.sequences(), h = attention.key_heads(), d = attention.q.size(3), dv = attention.v.size(3);
  const ScalarType dtype = statistics_type(attention.q);
  Sums sums{torch::stable::new_empty(attention.q, {n, h, d, dv}, dtype),
            torch::stable::new_empty(attention.q, {n, h, d}, dtype),
            torch::stable::new_empty(attention.q, {n, h, dv}, dtype)};
  torch::stable::zero_(sums.s);
  torch::stable::zero_(sums.z);
  torch::stable::zero_(sums.u);
  return sums;
}

inline Sums copied(const Attention& attention, const std::optional<Tensor>& s, const std::optional<Tensor>& z,
                   const std::optional<Tensor>& u) {
  Sums sums = new_sums(attention);
  require(s.has_value() == z.has_value() && s.has_value() == u.has_value(), Attention::kOp,
          "expected s, z and u together, got some of them");
  if (!s.has_value()) return sums;
  const auto take = [](Tensor& sum, const Tensor& given, const char* name) {
    require_dtype(given, sum.scalar_type(), Attention::kOp, name);
    require(shape_of(given) == shape_of(sum), Attention::kOp, "expected ", name, " to have shape ", shape_of(sum),
            ", got ", shape_of(given));
    torch::stable::copy_(sum, given);
  };
  take(sums.s, *s, "s");
  take(sums.z, *z, "z");
  take(sums.u, *u, "u");
  return sums;
}

}  // namespace tilewise
