// A flat C interface to the launch functions of the .cu files, for `make race` and, by ctypes, for the tests: the
// structs are mirrored in emulated.py. Strides are in elements; null pointers are absent tensors. All return an error,
// or null.
#pragma once

#include <cstdint>

#include "pairwise/pairwise.h"

struct Matrix {
  void* data;
  int64_t dtype, row_stride, column_stride;
};

struct Call {
  int64_t rows, columns;
  Matrix logits, gradient, probabilities;
  int64_t* target;
  float* weight;
  float* row_weight;
  int64_t ignore_index, reduction, details, kind;
  double scale, softcap, label_smoothing, lse_square_scale, a, b, eps;
  float *loss_rows, *share_rows, *row_state, *loss, *total, *lse, *entropy;
  int64_t* argmax;
  float *grad_loss, *grad_lse, *grad_entropy;
  int64_t grad_loss_stride, grad_lse_stride, grad_entropy_stride;
  int64_t all_rows, first_class, all_classes;  // of the problem that this is a block of; 0: it is the whole
  int64_t parts;                               // of each row going forward, with memory for their statistics; 0: whole
  void* part_memory;
};

// One chunk of a pairwise loss; the gradient is wanted where it has a place.
struct PairCall {
  int64_t rows, columns, row_stride;
  float* similarities;
  int64_t *x_labels, *y_labels;
  int32_t *short_labels, *too_long;  // formed first, where they have a place
  int64_t self_offset, excludes_self;
  float* guide;
  int64_t guide_stride;
  double guide_margin;
  const char* loss;
  double parameters[tilewise::kPairParameters];
  float *scale, *bias, *loss_rows, *active_rows;
  int64_t gradient_dtype;
  void* gradient;
  float* grad_loss;
  int64_t grad_loss_stride;
  float* bias_rows;
};

// One chunk of clip_loss, or its end; state is that of all `columns` pairs.
struct ClipCall {
  int64_t first, rows, columns;
  float *similarities, *scale, *state;
  void* parts;  // of rows, then of columns
  float *loss_rows, *share_rows, *loss, *total, *grad_loss;
  int64_t gradient_dtype;
  void* gradient;
};

struct TokenCall {
  void* data;
  int64_t batch, head, token;
};

// A whole call of mala: forward where there is no grad_out.
struct AttentionCall {
  int64_t dtype, sequences, heads, key_heads, queries, keys, features, values, causal, seen;
  double scale, eps;
  TokenCall q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  float *cos, *sin;
  int64_t *q_bounds, *k_bounds;
  float *start_s, *start_z, *start_u, *s, *z, *u;
};

// What all calls of sinkhorn have: a matrix of costs, or points.
struct TransportCall {
  int64_t cost, batch, rows, columns, features;
  float *matrix, *x, *y, *a, *b, *epsilon, *start, *f, *g;
  int64_t batch_stride, row_stride, column_stride;
  int64_t max_iter, symmetric;
  double scaling, rho_a, rho_b, tol;  // a rho of 0: a constraint
  float *value, *error;
  int64_t* n_iter;
  int64_t values, weights, over_distance, allow_tf32;
  float *v, *h, *k, *out;
  float *grad_f, *grad_g, *grad_cost, *grad_a, *grad_b, *grad_epsilon;
};

struct SparseCall {
  int64_t batch, rows, columns, k, method, max_iter;
  double gamma, tol, rate;
  const float *costs, *a, *b, *level;
  float *alpha, *values;
  int64_t* indices;
  float *beta, *row_sums, *margin, *value, *row_error, *column_error;
  int64_t* n_iter;
};

// Rows of elements, and k places for some of them.
struct RowsCall {
  int64_t batch, rows, columns, k, dtype;
  void* data;
  int64_t batch_stride, row_stride, column_stride;
  int32_t* indices;
  float* scales;
  void* out;
};

extern "C" {
const char* cross_entropy_forward(const Call& call);
const char* cross_entropy_backward(const Call& call);
const char* z_loss_forward(const Call& call);
const char* z_loss_backward(const Call& call);
const char* accumulate(int64_t dtype, const void* part, float* sum, void* out, int64_t count, int first, int last);
const char* pairwise(const PairCall& call);
const char* clip_statistics(const ClipCall& call);
const char* clip_finish(const ClipCall& call);
const char* clip_gradient(const ClipCall& call);
const char* attention(const AttentionCall& call);
const char* transport_solve(const TransportCall& call);
const char* transport_apply(const TransportCall& call, int plan);
const char* transport_unrolled(const TransportCall& call);
const char* simplex_topk(const float* x, const float* grad, float* out, int64_t rows, int64_t columns, int64_t k,
                         double scale);
const char* sparse_transport(const SparseCall& call);
const char* wta_crs_norms(const RowsCall& call);
const char* wta_crs_gather(const RowsCall& call);
const char* wta_crs_sample(const RowsCall& call, const float* x_norms, const float* y_norms, const int64_t* seed,
                           int64_t method, int64_t mix);
const char* wrong_kernel(int which);
}
