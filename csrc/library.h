// Every operator of the library: its schema, one entry each.
#pragma once

namespace tilewise {

// With a kernel per device.
template <typename Library>
void define_kernels(Library& m) {
  m.def(
      "clip_loss(Tensor image, Tensor text, Tensor logit_scale, *, str reduction=\"mean\", int chunk_bytes=0) "
      "-> (Tensor loss, Tensor state)");
  m.def(
      "clip_loss_backward(Tensor image, Tensor text, Tensor logit_scale, Tensor state, Tensor? grad_loss=None, *, "
      "int chunk_bytes=0, bool image_grad=True, bool text_grad=True) -> (Tensor grad_image, Tensor grad_text)");
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight=None, Tensor? row_weight=None, *, "
      "int ignore_index=-100, float label_smoothing=0.0, float lse_square_scale=0.0, float? softcap=None, "
      "float logit_scale=1.0, str reduction=\"mean\", bool inplace_backward=False) -> (Tensor loss, Tensor state)");
  m.def(
      "cross_entropy_with_stats(Tensor logits, Tensor target, Tensor? weight=None, Tensor? row_weight=None, *, "
      "int ignore_index=-100, float label_smoothing=0.0, float lse_square_scale=0.0, float? softcap=None, "
      "float logit_scale=1.0, str reduction=\"mean\", bool inplace_backward=False) "
      "-> (Tensor loss, Tensor state, Tensor lse, Tensor entropy, Tensor argmax)");
  m.def(
      "cross_entropy_backward(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor logits, "
      "Tensor target, Tensor? weight, Tensor? row_weight, Tensor? entropy, Tensor state, *, int ignore_index=-100, "
      "float label_smoothing=0.0, float lse_square_scale=0.0, float? softcap=None, float logit_scale=1.0, "
      "str reduction=\"mean\") -> Tensor");
  m.def(
      "cross_entropy_backward_(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor(a!) logits, "
      "Tensor target, Tensor? weight, Tensor? row_weight, Tensor? entropy, Tensor state, *, int ignore_index=-100, "
      "float label_smoothing=0.0, float lse_square_scale=0.0, float? softcap=None, float logit_scale=1.0, "
      "str reduction=\"mean\") -> ()");
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias=None, "
      "Tensor? weight=None, *, int ignore_index=-100, float label_smoothing=0.0, float lse_square_scale=0.0, "
      "float? softcap=None, str reduction=\"mean\", int chunk_bytes=0, bool form_input_grad=False, "
      "bool form_weight_grad=False, bool form_bias_grad=False) "
      "-> (Tensor loss, Tensor state, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias, Tensor? weight, Tensor state, *, int ignore_index, "
      "float label_smoothing, float lse_square_scale, float? softcap, str reduction, int chunk_bytes, "
      "bool input_grad, bool weight_grad, bool bias_grad) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "mala(Tensor q, Tensor k, Tensor v, Tensor? cos=None, Tensor? sin=None, Tensor? q_bounds=None, "
      "Tensor? k_bounds=None, Tensor? s=None, Tensor? z=None, Tensor? u=None, *, bool causal, float scale, float eps, "
      "int seen=0) -> (Tensor out, Tensor s, Tensor z, Tensor u)");
  m.def(
      "mala_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? q_bounds, "
      "Tensor? k_bounds, Tensor? s, Tensor? z, Tensor? u, *, bool causal, float scale, float eps, int seen) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "pairwise_loss(Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, Tensor scale, Tensor? bias=None, "
      "Tensor? guide_x=None, Tensor? guide_y=None, *, str loss, float[] parameters, int? self_offset=None, "
      "float guide_margin=0.0, str reduction=\"mean\", int chunk_bytes=0, bool form_x_grad=False, "
      "bool form_y_grad=False, bool form_bias_grad=False) "
      "-> (Tensor loss, Tensor total, Tensor grad_x, Tensor grad_y, Tensor grad_bias)");
  m.def(
      "pairwise_loss_backward(Tensor grad_loss, Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, Tensor scale, "
      "Tensor? bias, Tensor? guide_x, Tensor? guide_y, Tensor total, *, str loss, float[] parameters, "
      "int? self_offset, float guide_margin, str reduction, int chunk_bytes, bool x_grad, bool y_grad, "
      "bool bias_grad) -> (Tensor grad_x, Tensor grad_y, Tensor grad_bias)");
  m.def(
      "sinkhorn(Tensor cost, Tensor a, Tensor b, Tensor epsilon, Tensor? f=None, Tensor? g=None, Tensor? start=None, "
      "*, "
      "int max_iter, float tol, float? rho_a=None, float? rho_b=None, float scaling=0.5) "
      "-> (Tensor f, Tensor g, Tensor value, Tensor error, Tensor n_iter)");
  m.def(
      "sinkhorn_points(Tensor x, Tensor y, Tensor a, Tensor b, Tensor epsilon, Tensor? f=None, Tensor? g=None, "
      "Tensor? start=None, *, str cost, int max_iter, float tol, float? rho_a=None, float? rho_b=None, "
      "float scaling=0.5, bool symmetric=False, bool allow_tf32=False) "
      "-> (Tensor f, Tensor g, Tensor value, Tensor error, Tensor n_iter)");
  m.def(
      "sinkhorn_plan(Tensor cost, Tensor? a, Tensor? b, Tensor epsilon, Tensor f, Tensor g, *, float? rho_a=None, "
      "float? rho_b=None) -> Tensor");
  m.def("sinkhorn_apply(Tensor cost, Tensor? a, Tensor? b, Tensor epsilon, Tensor f, Tensor g, Tensor v) -> Tensor");
  m.def(
      "sinkhorn_points_apply(Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor epsilon, Tensor f, Tensor g, Tensor v, "
      "Tensor? h=None, Tensor? k=None, *, str cost, float? rho_a=None, float? rho_b=None, bool over_distance=False) "
      "-> Tensor");
  m.def(
      "sinkhorn_unrolled(Tensor cost, Tensor a, Tensor b, Tensor epsilon, *, int max_iter, float? rho_a=None, "
      "float? rho_b=None) -> (Tensor f, Tensor g)");
  m.def(
      "sinkhorn_unrolled_backward(Tensor grad_f, Tensor grad_g, Tensor cost, Tensor a, Tensor b, Tensor epsilon, *, "
      "int max_iter, float? rho_a=None, float? rho_b=None) "
      "-> (Tensor grad_cost, Tensor grad_a, Tensor grad_b, Tensor grad_epsilon)");
  m.def(
      "sparse_ot(Tensor costs, Tensor a, Tensor b, Tensor? alpha=None, Tensor? beta=None, *, int k, float gamma, "
      "str method, int max_iter, float tol, float lr=0.0) "
      "-> (Tensor values, Tensor indices, Tensor alpha, Tensor beta, Tensor value, Tensor row_error, "
      "Tensor column_error, Tensor margin, Tensor n_iter)");
  m.def(
      "sparse_ot_columns(Tensor costs, Tensor alpha, Tensor level, *, int k, float gamma, bool dual=False) "
      "-> (Tensor values, Tensor indices, Tensor beta, Tensor row_sums, Tensor margin)");
  m.def("simplex_topk(Tensor x, *, int k, float scale=1.0) -> Tensor");
  m.def("simplex_topk_backward(Tensor grad, Tensor p) -> Tensor");
  m.def("wta_crs_norms(Tensor x) -> Tensor");
  m.def(
      "wta_crs_sample(Tensor x_norms, Tensor? norms, Tensor seed, *, int k, str method=\"systematic\", "
      "float mix=0.05) -> (Tensor indices, Tensor scales)");
  m.def("wta_crs_gather(Tensor x, Tensor indices, Tensor? scales=None) -> Tensor");
  m.def(
      "z_loss(Tensor logits, Tensor target, *, float a, float b, int ignore_index=-100, str reduction=\"mean\") "
      "-> (Tensor loss, Tensor state)");
  m.def(
      "taylor_softmax_loss(Tensor logits, Tensor target, *, int ignore_index=-100, str reduction=\"mean\") "
      "-> (Tensor loss, Tensor state)");
  m.def(
      "spherical_softmax_loss(Tensor logits, Tensor target, *, float eps=1e-6, int ignore_index=-100, "
      "str reduction=\"mean\") -> (Tensor loss, Tensor state)");
  m.def(
      "spherical_family_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor state, *, "
      "int ignore_index=-100, str reduction=\"mean\") -> Tensor");
}

// Composed of PyTorch's own operators in pysrc/ops, once for all devices.
template <typename Library>
void define_composites(Library& m) {
  m.def(
      "linear_z_loss(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, *, float a, float b, "
      "int ignore_index=-100, str reduction=\"mean\") "
      "-> (Tensor loss, Tensor row_state, Tensor gram, Tensor mean, Tensor total)");
  m.def(
      "linear_taylor_softmax_loss(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, *, "
      "int ignore_index=-100, str reduction=\"mean\") "
      "-> (Tensor loss, Tensor row_state, Tensor gram, Tensor mean, Tensor total)");
  m.def(
      "linear_spherical_softmax_loss(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, *, float eps=1e-6, "
      "int ignore_index=-100, str reduction=\"mean\") "
      "-> (Tensor loss, Tensor row_state, Tensor gram, Tensor mean, Tensor total)");
  m.def(
      "sinkhorn_potentials(Tensor cost, Tensor a, Tensor b, Tensor epsilon, Tensor f, Tensor g, *, "
      "float? rho_a=None, float? rho_b=None) -> (Tensor f, Tensor g)");
  m.def(
      "sinkhorn_plan_backward(Tensor? grad_plan, Tensor? grad_f, Tensor? grad_g, Tensor cost, Tensor a, Tensor b, "
      "Tensor epsilon, Tensor f, Tensor g, *, float? rho_a, float? rho_b, bool a_grad, bool b_grad) "
      "-> (Tensor grad_cost, Tensor grad_a, Tensor grad_b, Tensor grad_epsilon)");
  m.def(
      "sinkhorn_points_apply_backward(Tensor grad, Tensor x, Tensor y, Tensor a, Tensor b, Tensor epsilon, Tensor f, "
      "Tensor g, Tensor v, *, str cost, float? rho_a, float? rho_b) "
      "-> (Tensor grad_x, Tensor grad_y, Tensor grad_a, Tensor grad_b, Tensor grad_epsilon, Tensor grad_v)");
  m.def(
      "sparse_ot_points(Tensor x, Tensor y, Tensor a, Tensor b, Tensor? alpha=None, Tensor? beta=None, *, str cost, "
      "int k, float gamma, str method, int max_iter, float tol, int chunk_bytes=0) "
      "-> (Tensor values, Tensor indices, Tensor alpha, Tensor beta, Tensor value, Tensor row_error, "
      "Tensor column_error, Tensor margin, Tensor n_iter)");
  m.def(
      "sparse_ot_backward(Tensor? grad_value, Tensor? grad_values, Tensor values, Tensor indices, Tensor alpha, "
      "Tensor beta, *, float gamma) -> (Tensor grad_entries, Tensor grad_a, Tensor grad_b)");
  m.def(
      "wta_crs_linear(Tensor x, Tensor weight, Tensor? bias=None, *, int? k=None, float? ratio=None, "
      "Tensor? norms=None, Tensor? seed=None, str method=\"systematic\", float mix=0.05) -> Tensor");
  m.def(
      "wta_crs_matmul(Tensor a, Tensor b, *, int k, Tensor? seed=None, str method=\"systematic\", float mix=0.05) "
      "-> Tensor");
  m.def(
      "linear_spherical_backward(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor row_state, Tensor gram, Tensor mean, Tensor total, *, int ignore_index, str reduction, "
      "bool grad_hidden, bool grad_weight, bool grad_bias) -> (Tensor, Tensor, Tensor)");
}

}  // namespace tilewise
