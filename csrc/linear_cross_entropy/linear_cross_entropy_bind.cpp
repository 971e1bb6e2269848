// linear_cross_entropy: cross_entropy of input @ linear_weight^T + linear_bias, block by block of the logits.
//
// Forward, by rows: a chunk of logits is formed, the row engine takes its statistics, and where gradients are
// needed writes its gradient over it, which enters two more products:
//
//   G = d(sum of losses)/d logits    grad_input = G W    grad_weight += G^T X    grad_bias += 1^T G
//
// Backward, by classes, for all that the forward does not form: a block of logits of all rows is formed again, and its
// part of grad_weight is one product. A reduction of "none" has one upstream gradient per row. Of float16 gradients
// underflow that the loss's scale has not reached yet. Of bfloat16 a (V, d) sum in float32 would go through memory with
// every chunk, which takes longer than the fourth product: callers ask for those of few logits
// (pysrc/ops/linear_cross_entropy.py).
#include <algorithm>

#include "common/gemm.h"
#include "common/operator.h"
#include "cross_entropy/cross_entropy_bind.h"
#include "linear_cross_entropy/chunks.h"

namespace tilewise {
namespace {

constexpr const char* kOp = "linear_cross_entropy";

struct Layer {
  const Tensor& input;   // (N, d)
  const Tensor& weight;  // (V, d)
  const std::optional<Tensor>& bias;
  RowMatrix logits;  // shape and dtype alone: they are formed by blocks
  int64_t chunk_bytes;
};

struct NeedsGrad {
  bool input, weight, bias;
  bool any() const { return input || weight || bias; }
};

struct Gradients {
  Tensor input, weight, bias;
};

Layer checked_layer(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t chunk_bytes) {
  const RowMatrix rows = row_matrix(input, kOp, "input");
  const RowMatrix classes = row_matrix(weight, kOp, "linear_weight");
  require(!kOnGpu || rows.dtype != Dtype::kFloat64, kOp,
          "expected input to be float32, bfloat16 or float16 on a GPU, got Double");
  require_dtype(weight, input.scalar_type(), kOp, "linear_weight");
  require(classes.rows >= 1, kOp, "expected linear_weight to have at least one class, got shape ", shape_of(weight));
  require_shape(weight, {classes.rows, rows.columns}, kOp, "linear_weight");
  if (bias.has_value()) {
    require_shape(*bias, {classes.rows}, kOp, "linear_bias");
    require_dtype(*bias, input.scalar_type(), kOp, "linear_bias");
  }
  require(chunk_bytes >= 0, kOp, "expected chunk_bytes not below 0, got ", chunk_bytes);
  const RowMatrix logits{.dtype = rows.dtype, .rows = rows.rows, .columns = classes.rows};
  return {input, weight, bias, logits, chunk_bytes};
}

int64_t lines_at_a_time(const Layer& layer, int64_t count, int64_t length, int64_t min_lines) {
  const int64_t line_bytes = length * layer.input.element_size();
  return logits_at_a_time(count, line_bytes, min_lines, layer.chunk_bytes, kOnGpu);
}

// Blocks [begin, begin + n) of [0, count), n = size but for the last.
template <typename Function>
void for_blocks(int64_t count, int64_t size, Function f) {
  for (int64_t begin = 0; begin < count; begin += size) f(begin, std::min(size, count - begin));
}

void form_logits(const RowProducts& products, const Tensor& out, const Layer& layer, const Tensor& input,
                 int64_t first_class, int64_t classes) {
  std::optional<Tensor> bias;
  if (layer.bias.has_value()) bias = rows_of(*layer.bias, first_class, classes);
  products.form(out, input, rows_of(layer.weight, first_class, classes), bias);
}

Tensor ones(const Tensor& like, int64_t columns, ScalarType dtype) {
  Tensor row = new_output(like, {1, columns}, dtype);
  torch::stable::fill_(row, 1.0);
  return row;
}

Gradients new_gradients(const Layer& layer, const NeedsGrad& needs_grad) {
  const int64_t n = layer.logits.rows, v = layer.logits.columns, d = layer.input.size(1);
  const ScalarType dtype = layer.input.scalar_type();
  // In ordinary pages: the products write them once, and a huge page that the host of a virtual machine has taken back
  // costs more than the products of 64 rows.
  const auto gradient = [&](bool is_needed, std::vector<int64_t> shape) {
    return torch::stable::new_empty(layer.input, is_needed ? shape : std::vector<int64_t>{0}, dtype);
  };
  Gradients gradients{gradient(needs_grad.input, {n, d}), gradient(needs_grad.weight, {v, d}),
                      gradient(needs_grad.bias, {v})};
  if (n == 0) {
    torch::stable::zero_(gradients.weight);
    torch::stable::zero_(gradients.bias);
  }
  return gradients;
}

template <typename T>
CrossEntropyForward<T> forward_op(const Layer& layer, const Tensor& target, const std::optional<Tensor>& class_weight,
                                  const CrossEntropyOptions& options) {
  CrossEntropyForward<T> op;
  op.logits = layer.logits;
  op.all_rows = layer.logits.rows;
  op.request = {transform_of<T>(options),
                dense_target<T>(layer.input, layer.logits, target, class_weight, options, kOp), false};
  if (is_class_index(target)) op.target = class_indices(target, layer.logits, options.ignore_index, kOp);
  op.ignore_index = options.ignore_index;
  op.confidence = static_cast<T>(1 - options.label_smoothing);
  op.lse_square_scale = static_cast<T>(options.lse_square_scale);
  return op;
}

// The gradient of the same rows; its upstream is the caller's to set.
template <typename T>
CrossEntropyBackward<T> backward_op(const CrossEntropyForward<T>& forward, const T* row_state) {
  CrossEntropyBackward<T> op;
  op.logits = forward.logits;
  op.transform = forward.request.transform;
  op.dense = forward.request.dense;
  op.target = forward.target;
  op.ignore_index = forward.ignore_index;
  op.confidence = forward.confidence;
  op.lse_square_scale = forward.lse_square_scale;
  op.row_state = row_state;
  op.all_rows = forward.all_rows;
  return op;
}

void move_rows(RowMatrix& probabilities, int64_t rows) {
  if (probabilities.data == nullptr) return;
  const int64_t bytes = probabilities.dtype == Dtype::kFloat64 ? 8 : probabilities.dtype == Dtype::kFloat32 ? 4 : 2;
  probabilities.data = static_cast<char*>(probabilities.data) + rows * probabilities.row_stride * bytes;
}

void move_columns(RowMatrix& probabilities, int64_t columns) {
  std::swap(probabilities.row_stride, probabilities.column_stride);
  move_rows(probabilities, columns);
  std::swap(probabilities.row_stride, probabilities.column_stride);
}

template <typename T>
CrossEntropyForward<T> part_of_rows(CrossEntropyForward<T> op, int64_t begin, const Tensor& chunk) {
  op.logits = row_matrix(chunk, kOp, "logits");
  if (op.target != nullptr) op.target += begin;
  op.loss_rows += begin;
  op.share_rows += begin;
  op.row_state += begin;
  move_rows(op.request.dense.probabilities, begin);
  return op;
}

// The gradient over the logits of classes [first_class, first_class + columns of block).
template <typename T>
CrossEntropyBackward<T> part_of_classes(CrossEntropyBackward<T> op, int64_t first_class, const Tensor& block) {
  op.logits = op.gradient = row_matrix(block, kOp, "logits");
  op.first_class = first_class;
  if (op.dense.weight != nullptr) op.dense.weight += first_class;
  move_columns(op.dense.probabilities, first_class);
  return op;
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
ForwardResult forward_as(const Layer& layer, const Tensor& target, const std::optional<Tensor>& class_weight,
                         const CrossEntropyOptions& options, const NeedsGrad& needs_grad) {
  const int64_t n = layer.logits.rows, v = layer.logits.columns;
  const LossOutputs outputs(layer.input, options.reduction, kStatePerRow);
  CrossEntropyForward<T> op = forward_op<T>(layer, target, class_weight, options);
  op.loss_rows = outputs.loss_rows<T>();
  op.share_rows = outputs.share_rows<T>();
  op.row_state = outputs.row_state<T>();

  const int64_t rows = lines_at_a_time(layer, n, v, layer.chunk_bytes == 0 ? kMinRows : 1);
  const Tensor buffer = new_output(layer.input, {rows, v}, layer.input.scalar_type());
  const RowProducts products(layer.input, rows, v);
  const Gradients gradients = new_gradients(layer, needs_grad);
  const Tensor upstream = ones(layer.input, 1, statistics_type(layer.input));
  const Tensor one = ones(layer.input, needs_grad.bias ? rows : 1, layer.input.scalar_type());
  ProductSum of_weight(gradients.weight), of_bias(torch::stable::unsqueeze(gradients.bias, 0));
  for_blocks(n, rows, [&](int64_t begin, int64_t count) {
    const Tensor input = rows_of(layer.input, begin, count);
    const Tensor chunk = rows_of(buffer, 0, count);
    form_logits(products, chunk, layer, input, 0, v);
    const CrossEntropyForward<T> part = part_of_rows(op, begin, chunk);
    run(part, layer.input, kOp);
    if (!needs_grad.any()) return;
    CrossEntropyBackward<T> backward = backward_op(part, part.row_state);
    backward.upstream.grad_loss = static_cast<const T*>(upstream.data_ptr());
    run(part_of_classes(backward, 0, chunk), layer.input, kOp);
    if (needs_grad.input) {
      const Tensor out = rows_of(gradients.input, begin, count);
      add_product(out, out, chunk, layer.weight, 0.0);
    }
    const bool first = begin == 0, last = begin + count == n;
    if (needs_grad.weight) of_weight.add(transposed(chunk), input, first, last);
    if (needs_grad.bias) of_bias.add(columns_of(one, 0, count), chunk, first, last);
  });
  run(outputs.reduction<T>(), layer.input, kOp);
  return {outputs.loss, outputs.state, gradients.input, gradients.weight, gradients.bias};
}

// form_* ask for the gradients of the summed loss. Reduced losses have them, but of float16 (else: empty).
ForwardResult forward(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                      const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
                      int64_t ignore_index, double label_smoothing, double lse_square_scale,
                      std::optional<double> softcap, const std::string& reduction, int64_t chunk_bytes,
                      bool form_input_grad, bool form_weight_grad, bool form_bias_grad) {
  const Layer layer = checked_layer(input, linear_weight, linear_bias, chunk_bytes);
  const DeviceScope scope(input);
  const CrossEntropyOptions options =
      checked_options(ignore_index, label_smoothing, lse_square_scale, softcap, 1.0, reduction, kOp);
  const bool in_forward = options.reduction != Reduction::kNone && input.scalar_type() != ScalarType::Half;
  const NeedsGrad needs_grad{in_forward && form_input_grad, in_forward && form_weight_grad,
                             in_forward && form_bias_grad && linear_bias.has_value()};
  return with_statistics(
      input, [&](auto zero) { return forward_as<decltype(zero)>(layer, target, weight, options, needs_grad); });
}

template <typename T>
Gradients backward_as(const Tensor& grad_loss, const Layer& layer, const Tensor& target,
                      const std::optional<Tensor>& class_weight, const Tensor& state,
                      const CrossEntropyOptions& options, const NeedsGrad& needs_grad) {
  const int64_t n = layer.logits.rows, v = layer.logits.columns;
  const T* row_state = state_of<T>(state, layer.input, kStatePerRow, kOp);
  CrossEntropyBackward<T> op = backward_op(forward_op<T>(layer, target, class_weight, options), row_state);
  op.upstream = upstream_of<T>(grad_loss, layer.input, nullptr, row_state + kStatePerRow * n, options.reduction, kOp);
  const Gradients gradients = new_gradients(layer, needs_grad);
  if (n == 0 || !needs_grad.any()) return gradients;

  const int64_t classes = lines_at_a_time(layer, v, n, kMinClasses);
  const Tensor buffer = new_output(layer.input, {n, classes}, layer.input.scalar_type());
  const RowProducts products(layer.input, n, classes);
  const Tensor one = ones(layer.input, needs_grad.bias ? n : 1, layer.input.scalar_type());
  std::optional<ProductSum> input_gradient;
  if (needs_grad.input) input_gradient.emplace(gradients.input);
  for_blocks(v, classes, [&](int64_t first, int64_t width) {
    const Tensor block = columns_of(buffer, 0, width);
    form_logits(products, block, layer, layer.input, first, width);
    run(part_of_classes(op, first, block), layer.input, kOp);
    if (needs_grad.input)
      input_gradient->add(block, rows_of(layer.weight, first, width), first == 0, first + width == v);
    if (needs_grad.weight) {
      const Tensor out = rows_of(gradients.weight, first, width);
      add_product(out, out, transposed(block), layer.input, 0.0);
    }
    if (needs_grad.bias) {
      const Tensor out = torch::stable::unsqueeze(rows_of(gradients.bias, first, width), 0);
      add_product(out, out, one, block, 0.0);
    }
  });
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& input, const Tensor& linear_weight,
                                            const Tensor& target, const std::optional<Tensor>& linear_bias,
                                            const std::optional<Tensor>& weight, const Tensor& state,
                                            int64_t ignore_index, double label_smoothing, double lse_square_scale,
                                            std::optional<double> softcap, const std::string& reduction,
                                            int64_t chunk_bytes, bool input_grad, bool weight_grad, bool bias_grad) {
  const Layer layer = checked_layer(input, linear_weight, linear_bias, chunk_bytes);
  const DeviceScope scope(input);
  const CrossEntropyOptions options =
      checked_options(ignore_index, label_smoothing, lse_square_scale, softcap, 1.0, reduction, kOp);
  const NeedsGrad needs_grad{input_grad, weight_grad, bias_grad && linear_bias.has_value()};
  const Gradients gradients = with_statistics(input, [&](auto zero) {
    return backward_as<decltype(zero)>(grad_loss, layer, target, weight, state, options, needs_grad);
  });
  return {gradients.input, gradients.weight, gradients.bias};
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_IMPL(tilewise, TILEWISE_DISPATCH_KEY, m) {
  TILEWISE_IMPL(m, "linear_cross_entropy", tilewise::forward);
  TILEWISE_IMPL(m, "linear_cross_entropy_backward", tilewise::backward);
}
