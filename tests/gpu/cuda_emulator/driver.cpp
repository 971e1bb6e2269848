// A flat C interface to the launch functions of the .cu files (calls.h).
#include "calls.h"

#include "common/accumulate.h"
#include "cross_entropy/cross_entropy.h"
#include "mala/mala_launch.h"
#include "pairwise/programs.h"
#include "recording.h"
#include "simplex_topk/simplex_topk.h"
#include "sinkhorn/sinkhorn_launch.h"
#include "sparse_ot/sparse_ot_launch.h"
#include "z_loss/z_loss.h"

namespace {

tilewise::Pairs<float> pairs_of(const TransportCall& call) {
  tilewise::Pairs<float> pairs{.batch = call.batch, .rows = call.rows, .columns = call.columns};
  pairs.cost = static_cast<int32_t>(call.cost);
  pairs.matrix = call.matrix;
  pairs.batch_stride = call.batch_stride;
  pairs.row_stride = call.row_stride;
  pairs.column_stride = call.column_stride;
  pairs.features = call.features;
  pairs.x = call.x;
  pairs.y = call.y;
  pairs.allow_tf32 = call.allow_tf32 != 0;
  return pairs;
}

float penalty_of(double rho) { return rho > 0 ? static_cast<float>(rho) : tilewise::infinity<float>(); }

// Calls f with launches over poisoned scratch memory.
template <typename Launches, typename Function>
const char* with_launches(int64_t bytes, Function f) {
  emulator::Scratch scratch(bytes, tilewise::quiet_nan<float>());
  Launches launches(scratch.data(), nullptr);
  return f(launches);
}

tilewise::RowMatrix matrix_of(const Call& call, const Matrix& m) {
  return {.data = m.data,
          .dtype = static_cast<tilewise::Dtype>(m.dtype),
          .rows = call.rows,
          .columns = call.columns,
          .row_stride = m.row_stride,
          .column_stride = m.column_stride};
}

tilewise::Transform<float> transform_of(const Call& call) {
  return {.scale = static_cast<float>(call.scale), .softcap = static_cast<float>(call.softcap)};
}

tilewise::DenseTarget<float> dense_of(const Call& call) {
  tilewise::DenseTarget<float> dense;
  dense.uniform = static_cast<float>(call.label_smoothing /
                                     static_cast<double>(call.all_classes != 0 ? call.all_classes : call.columns));
  dense.soft = call.probabilities.data != nullptr ? static_cast<float>(1.0 - call.label_smoothing) : 0.0f;
  dense.weight = call.weight;
  dense.probabilities = matrix_of(call, call.probabilities);
  return dense;
}

tilewise::RowReduction<float> reduction_of(const Call& call) {
  tilewise::RowReduction<float> reduction;
  reduction.rows = call.rows;
  reduction.loss_rows = call.loss_rows;
  reduction.share_rows = call.share_rows;
  reduction.reduction = static_cast<tilewise::Reduction>(call.reduction);
  reduction.loss = call.loss;
  reduction.total = call.total;
  return reduction;
}

tilewise::Upstream<float> upstream_of(const Call& call) {
  tilewise::Upstream<float> upstream;
  upstream.grad_loss = call.grad_loss;
  upstream.stride = call.grad_loss_stride;
  upstream.row_weight = call.row_weight;
  upstream.total = call.total;
  upstream.mean = static_cast<tilewise::Reduction>(call.reduction) == tilewise::Reduction::kMean;
  return upstream;
}

tilewise::RowParts parts_of(const Call& call) {
  if (call.parts == 0) return {};
  return {call.parts, call.part_memory};
}

}  // namespace

extern "C" const char* cross_entropy_forward(const Call& call) {
  tilewise::CrossEntropyForward<float> op;
  op.logits = matrix_of(call, call.logits);
  op.request = {.transform = transform_of(call), .dense = dense_of(call), .details = call.details != 0};
  op.target = call.target;
  op.row_weight = call.row_weight;
  op.ignore_index = call.ignore_index;
  op.confidence = static_cast<float>(1.0 - call.label_smoothing);
  op.lse_square_scale = static_cast<float>(call.lse_square_scale);
  op.loss_rows = call.loss_rows;
  op.share_rows = call.share_rows;
  op.row_state = call.row_state;
  op.all_rows = call.all_rows;
  op.lse = call.lse;
  op.entropy = call.entropy;
  op.argmax = call.argmax;
  op.parts = parts_of(call);
  const char* error = tilewise::cross_entropy_forward_cuda(op, nullptr);
  return error != nullptr ? error : tilewise::cross_entropy_reduction_cuda(reduction_of(call), nullptr);
}

extern "C" const char* cross_entropy_backward(const Call& call) {
  tilewise::CrossEntropyBackward<float> op;
  op.logits = matrix_of(call, call.logits);
  op.gradient = matrix_of(call, call.gradient);
  op.transform = transform_of(call);
  op.dense = dense_of(call);
  op.target = call.target;
  op.ignore_index = call.ignore_index;
  op.confidence = static_cast<float>(1.0 - call.label_smoothing);
  op.lse_square_scale = static_cast<float>(call.lse_square_scale);
  op.upstream = upstream_of(call);
  op.grad_lse = call.grad_lse;
  op.grad_lse_stride = call.grad_lse_stride;
  op.grad_entropy = call.grad_entropy;
  op.grad_entropy_stride = call.grad_entropy_stride;
  op.entropy = call.entropy;
  op.row_state = call.row_state;
  op.all_rows = call.all_rows;
  op.first_class = call.first_class;
  return tilewise::cross_entropy_backward_cuda(op, nullptr);
}

extern "C" const char* accumulate(int64_t dtype, const void* part, float* sum, void* out, int64_t count, int first,
                                  int last) {
  const tilewise::Accumulation op{static_cast<tilewise::Dtype>(dtype), part, sum, out, count, first != 0, last != 0};
  return tilewise::accumulate_cuda(op, nullptr);
}

extern "C" const char* pairwise(const PairCall& call) {
  tilewise::PairwiseChunk<float> chunk;
  chunk.similarities = call.similarities;
  chunk.rows = call.rows;
  chunk.columns = call.columns;
  chunk.row_stride = call.row_stride;
  chunk.relations = {.x_labels = call.x_labels,
                     .y_labels = call.y_labels,
                     .short_labels = call.short_labels,
                     .too_long = call.too_long,
                     .self_offset = call.self_offset,
                     .excludes_self = call.excludes_self != 0,
                     .guide = call.guide,
                     .guide_stride = call.guide_stride,
                     .guide_margin = static_cast<float>(call.guide_margin)};
  chunk.program = tilewise::place_of_program(call.loss);
  if (chunk.program < 0) return "no such loss";
  for (int i = 0; i < tilewise::kPairParameters; ++i) chunk.parameters[i] = static_cast<float>(call.parameters[i]);
  chunk.scale = call.scale;
  chunk.bias = call.bias;
  chunk.loss_rows = call.loss_rows;
  chunk.active_rows = call.active_rows;
  chunk.wants_gradient = call.gradient != nullptr;
  chunk.gradient_dtype = static_cast<tilewise::Dtype>(call.gradient_dtype);
  chunk.gradient = call.gradient;
  chunk.upstream = {.grad_loss = call.grad_loss, .stride = call.grad_loss_stride};
  chunk.bias_rows = call.bias_rows;
  if (call.short_labels != nullptr) {
    const tilewise::ShortLabels labels{call.y_labels, call.columns, call.short_labels, call.too_long};
    if (const char* error = tilewise::short_labels_cuda(labels, nullptr)) return error;
  }
  return tilewise::pairwise_cuda(chunk, nullptr);
}

extern "C" const char* attention(const AttentionCall& call) {
  const auto tokens = [](const TokenCall& t) { return tilewise::TokenTensor{t.data, t.batch, t.head, t.token}; };
  tilewise::MalaCall op;
  op.dtype = static_cast<tilewise::Dtype>(call.dtype);
  op.sequences = call.sequences;
  op.heads = call.heads;
  op.key_heads = call.key_heads;
  op.queries = call.queries;
  op.keys = call.keys;
  op.features = call.features;
  op.values = call.values;
  op.scale = static_cast<float>(call.scale);
  op.eps = static_cast<float>(call.eps);
  op.causal = call.causal != 0;
  op.seen = call.seen;
  op.q = tokens(call.q);
  op.k = tokens(call.k);
  op.v = tokens(call.v);
  op.out = tokens(call.out);
  op.grad_out = tokens(call.grad_out);
  op.grad_q = tokens(call.grad_q);
  op.grad_k = tokens(call.grad_k);
  op.grad_v = tokens(call.grad_v);
  op.cos = call.cos;
  op.sin = call.sin;
  op.q_bounds = call.q_bounds;
  op.k_bounds = call.k_bounds;
  const bool backward = call.grad_out.data != nullptr;
  emulator::Scratch scratch(4 * tilewise::MalaLaunches::scratch_floats(op, backward), 1e30f);
  tilewise::MalaLaunches launches(op, scratch.data(), nullptr);
  if (!backward) return launches.forward({call.start_s, call.start_z, call.start_u}, {call.s, call.z, call.u});
  if (op.causal) return launches.backward({call.start_s, call.start_z, call.start_u});
  return launches.backward({call.s, call.z, call.u});
}

extern "C" const char* transport_solve(const TransportCall& call) {
  tilewise::SinkhornCall<float> op{.pairs = pairs_of(call)};
  op.a = call.a;
  op.b = call.b;
  op.epsilon = call.epsilon;
  op.start = call.start;
  op.scaling = static_cast<float>(call.scaling);
  op.rho_a = penalty_of(call.rho_a);
  op.rho_b = penalty_of(call.rho_b);
  op.max_iter = call.max_iter;
  op.tol = static_cast<float>(call.tol);
  op.symmetric = call.symmetric != 0;
  op.f = call.f;
  op.g = call.g;
  op.value = call.value;
  op.error = call.error;
  op.n_iter = call.n_iter;
  return with_launches<tilewise::SinkhornLaunches>(tilewise::SinkhornLaunches::solve_bytes(op),
                                                   [&](auto& l) { return l.solve(op); });
}

extern "C" const char* transport_apply(const TransportCall& call, int plan) {
  tilewise::SinkhornApply<float> op{.pairs = pairs_of(call)};
  op.a = call.a;
  op.b = call.b;
  op.epsilon = call.epsilon;
  op.f = call.f;
  op.g = call.g;
  op.v = call.v;
  op.values = call.values;
  op.h = call.h;
  op.k = call.k;
  op.weights = call.weights;
  op.over_distance = call.over_distance != 0;
  op.out = call.out;
  return with_launches<tilewise::SinkhornLaunches>(tilewise::SinkhornLaunches::apply_bytes(op),
                                                   [&](auto& l) { return plan != 0 ? l.plan(op) : l.apply(op); });
}

extern "C" const char* transport_unrolled(const TransportCall& call) {
  tilewise::SinkhornUnrolled<float> op{.pairs = pairs_of(call)};
  op.a = call.a;
  op.b = call.b;
  op.epsilon = call.epsilon;
  op.rho_a = penalty_of(call.rho_a);
  op.rho_b = penalty_of(call.rho_b);
  op.max_iter = call.max_iter;
  op.grad_f = call.grad_f;
  op.grad_g = call.grad_g;
  op.grad_cost = call.grad_cost;
  op.grad_a = call.grad_a;
  op.grad_b = call.grad_b;
  op.grad_epsilon = call.grad_epsilon;
  return with_launches<tilewise::SinkhornLaunches>(tilewise::SinkhornLaunches::unrolled_bytes(op),
                                                   [&](auto& l) { return l.unrolled(op); });
}

extern "C" const char* simplex_topk(const float* x, const float* grad, float* out, int64_t rows, int64_t columns,
                                    int64_t k, double scale) {
  tilewise::SimplexTopk<float> call{.rows = rows, .columns = columns, .k = k, .scale = static_cast<float>(scale)};
  call.x = x;
  call.grad = grad;
  call.out = out;
  return grad != nullptr ? tilewise::simplex_topk_backward_cuda(call, nullptr)
                         : tilewise::simplex_topk_cuda(call, nullptr);
}

// Without a: the columns alone, at alpha and level.
extern "C" const char* sparse_transport(const SparseCall& call) {
  tilewise::SparseColumns<float> columns{.batch = call.batch, .rows = call.rows, .columns = call.columns, .k = call.k};
  columns.gamma = static_cast<float>(call.gamma);
  columns.dual = static_cast<tilewise::SparseMethod>(call.method) == tilewise::SparseMethod::kDual;
  columns.costs = call.costs;
  columns.values = call.values;
  columns.indices = call.indices;
  columns.beta = call.beta;
  columns.margin = call.margin;
  using Launches = tilewise::SparseOtLaunches;
  if (call.a == nullptr) {
    columns.alpha = call.alpha;
    columns.level = call.level;
    columns.row_sums = call.row_sums;
    columns.alpha_stride = columns.row_stride = call.rows;
    columns.level_stride = call.columns;
    return with_launches<Launches>(Launches::columns_bytes(columns), [&](auto& l) { return l.columns(columns); });
  }
  tilewise::SparseOtCall<float> op{.columns = columns, .method = static_cast<tilewise::SparseMethod>(call.method)};
  op.a = call.a;
  op.b = call.b;
  op.max_iter = call.max_iter;
  op.tol = static_cast<float>(call.tol);
  op.rate = static_cast<float>(call.rate);
  op.alpha = call.alpha;
  op.value = call.value;
  op.row_error = call.row_error;
  op.column_error = call.column_error;
  op.n_iter = call.n_iter;
  return with_launches<Launches>(Launches::solve_bytes(op), [&](auto& l) { return l.solve(op); });
}

extern "C" const char* z_loss_forward(const Call& call) {
  tilewise::SphericalForward<float> op;
  op.logits = matrix_of(call, call.logits);
  op.member = static_cast<int32_t>(call.kind);
  const bool spherical = op.member == tilewise::SphericalFamily::place_of<tilewise::SphericalSoftmax>();
  op.a = static_cast<float>(spherical ? call.eps : call.a);
  op.b = static_cast<float>(call.b);
  op.target = call.target;
  op.ignore_index = call.ignore_index;
  op.loss_rows = call.loss_rows;
  op.share_rows = call.share_rows;
  op.row_state = call.row_state;
  op.parts = parts_of(call);
  return tilewise::z_loss_forward_cuda(op, reduction_of(call), nullptr);
}

extern "C" const char* z_loss_backward(const Call& call) {
  tilewise::SphericalBackward<float> op;
  op.logits = matrix_of(call, call.logits);
  op.gradient = matrix_of(call, call.gradient);
  op.target = call.target;
  op.ignore_index = call.ignore_index;
  op.upstream = upstream_of(call);
  op.row_state = call.row_state;
  return tilewise::z_loss_backward_cuda(op, nullptr);
}
