// Magnitude-aware linear attention over heads (B, H, N, D), or over sequences packed one behind the other.
#include "common/operator.h"
#if defined(TILEWISE_CUDA)
#include "mala/mala_bind.h"
#include "mala/mala_launch.h"
#else
#include "mala/mala_cpu.h"
#endif

namespace tilewise {
namespace {

constexpr const char* kOp = Attention::kOp;

#if defined(TILEWISE_CUDA)

TokenTensor tokens_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

MalaCall call_of(const Attention& attention) {
  MalaCall call;
  call.dtype = *storage_of(attention.q);
  call.sequences = attention.sequences();
  call.heads = attention.heads();
  call.key_heads = attention.key_heads();
  call.queries = attention.q.size(2);
  call.keys = attention.k.size(2);
  call.features = attention.q.size(3);
  call.values = attention.v.size(3);
  call.scale = static_cast<float>(attention.scale);
  call.eps = static_cast<float>(attention.eps);
  call.causal = attention.causal;
  call.seen = attention.seen;
  call.q = tokens_of(attention.q);
  call.k = tokens_of(attention.k);
  call.v = tokens_of(attention.v);
  const auto data = [](const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? tensor->data_ptr() : nullptr;
  };
  call.cos = static_cast<const float*>(data(attention.cos));
  call.sin = static_cast<const float*>(data(attention.sin));
  call.q_bounds = static_cast<const int64_t*>(data(attention.q_bounds));
  call.k_bounds = static_cast<const int64_t*>(data(attention.k_bounds));
  return call;
}

MalaSums<float> pointers(const Sums& sums) {
  return {static_cast<float*>(sums.s.data_ptr()), static_cast<float*>(sums.z.data_ptr()),
          static_cast<float*>(sums.u.data_ptr())};
}

Tensor scratch_of(const Attention& attention, const MalaCall& call, bool backward) {
  return torch::stable::new_empty(attention.q, {MalaLaunches::scratch_floats(call, backward)}, ScalarType::Float);
}

// `start` and `total` may not be one: the sums before the first token are read after those of all are written.
void run_forward(const Attention& attention, const Sums& start, const Sums& total, const Tensor& out) {
  MalaCall call = call_of(attention);
  call.out = tokens_of(out);
  const Tensor scratch = scratch_of(attention, call, false);
  MalaLaunches launches(call, static_cast<float*>(scratch.data_ptr()), current_stream(attention.q));
  require_launched(launches.forward(pointers(start), pointers(total)), kOp);
}

void run_backward(const Attention& attention, const Tensor& grad_out, const Sums& sums, const Tensor& grad_q,
                  const Tensor& grad_k, const Tensor& grad_v) {
  MalaCall call = call_of(attention);
  call.grad_out = tokens_of(grad_out);
  call.grad_q = tokens_of(grad_q);
  call.grad_k = tokens_of(grad_k);
  call.grad_v = tokens_of(grad_v);
  const Tensor scratch = scratch_of(attention, call, true);
  MalaLaunches launches(call, static_cast<float*>(scratch.data_ptr()), current_stream(attention.q));
  require_launched(launches.backward(pointers(sums)), kOp);
}

#else

void run_forward(const Attention& attention, const Sums&, const Sums& total, const Tensor& out) {
  with_statistics(out, [&](auto zero) { forward_as<decltype(zero)>(attention, total, out); });
}

void run_backward(const Attention& attention, const Tensor& grad_out, const Sums& sums, const Tensor& grad_q,
                  const Tensor& grad_k, const Tensor& grad_v) {
  const Gradients gradients{grad_q, grad_k, grad_v};
  with_statistics(grad_out, [&](auto zero) { backward_as<decltype(zero)>(attention, grad_out, sums, gradients); });
}

#endif

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                   const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                                                   const std::optional<Tensor>& q_bounds,
                                                   const std::optional<Tensor>& k_bounds,
                                                   const std::optional<Tensor>& s, const std::optional<Tensor>& z,
                                                   const std::optional<Tensor>& u, bool causal, double scale,
                                                   double eps, int64_t seen) {
  const Attention attention{q, k, v, cos, sin, q_bounds, k_bounds, causal, scale, eps, seen};
  check(attention);
  const DeviceScope scope(q);
  const Sums start = copied(attention, s, z, u);
  const Sums sums = copied(attention, s, z, u);
  const Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type());
  run_forward(attention, start, sums, out);
  return {out, sums.s, sums.z, sums.u};
}

// s, z, u: the sums of the forward; when causal, those before the first token.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                                            const std::optional<Tensor>& q_bounds,
                                            const std::optional<Tensor>& k_bounds, const std::optional<Tensor>& s,
                                            const std::optional<Tensor>& z, const std::optional<Tensor>& u, bool causal,
                                            double scale, double eps, int64_t seen) {
  const Attention attention{q, k, v, cos, sin, q_bounds, k_bounds, causal, scale, eps, seen};
  check(attention);
  check_tokens(grad_out, q, "grad_out");
  require_shape(grad_out, {q.size(0), q.size(1), q.size(2), v.size(3)}, kOp, "grad_out");
  const Sums sums = copied(attention, s, z, u);
  const auto like = [](const Tensor& tensor) {
    return torch::stable::new_empty(tensor, {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)},
                                    tensor.scalar_type());
  };
  const DeviceScope scope(q);
  const Tensor grad_q = like(q), grad_k = like(k), grad_v = like(v);
  run_backward(attention, grad_out, sums, grad_q, grad_k, grad_v);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_IMPL(tilewise, TILEWISE_DISPATCH_KEY, m) {
  TILEWISE_IMPL(m, "mala", tilewise::forward);
  TILEWISE_IMPL(m, "mala_backward", tilewise::backward);
}
