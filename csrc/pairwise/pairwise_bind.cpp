// Pairwise losses, a chunk of rows of the similarities at a time: a product forms it, a program per row
// (pairwise/programs.h) takes its loss from it and where gradients are wanted writes G = dL/dz over it, which enters
// two more products:
//
//   grad_x = G Y      grad_y += G^T X      grad_bias = G 1
//
// The gradients are those of z = s + bias: with z = scale s + bias a caller multiplies them by scale.
#include <algorithm>

#include "common/operator.h"
#include "pairwise/gradient_products.h"
#include "pairwise/programs.h"
#include "rows/rows_bind.h"

namespace tilewise {
namespace {

constexpr const char* kOp = "pairwise_loss";

struct Problem {
  const Tensor& x;
  const Tensor& y;
  const Tensor& x_labels;
  const Tensor& y_labels;
  const Tensor& scale;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& guide_x;
  const std::optional<Tensor>& guide_y;
  const std::string& loss;
  const std::vector<double>& parameters;
  std::optional<int64_t> self_offset;
  double guide_margin;
  int64_t chunk_bytes;
};

struct Wanted {
  bool x, y, bias;
  bool any() const { return x || y || bias; }
};

struct Gradients {
  Tensor x, y, bias;
};

int program_of(const Problem& problem) {
  const int place = place_of_program(problem.loss);
  require(place >= 0, kOp, "expected loss to be the name of a loss, got '", problem.loss, "'");
  const size_t parameters = static_cast<size_t>(kPairPrograms[static_cast<size_t>(place)].parameters);
  require(problem.parameters.size() == parameters, kOp, "expected ", parameters, " parameters of loss '", problem.loss,
          "', got ", problem.parameters.size());
  return place;
}

const int64_t* labels_of(const Tensor& labels, const Tensor& of, const char* name) {
  return dense<int64_t>(labels, {of.size(0)}, ScalarType::Long, kOp, name);
}

void check_pair(const Tensor& x, const Tensor& y, const char* x_name, const char* y_name) {
  row_matrix(x, kOp, x_name);
  row_matrix(y, kOp, y_name);
  require_dtype(y, x.scalar_type(), kOp, y_name);
  require_shape(y, {y.size(0), x.size(1)}, kOp, y_name);
}

void check(const Problem& problem) {
  check_pair(problem.x, problem.y, "x", "y");
  [[maybe_unused]] const ScalarType dtype = problem.x.scalar_type();
#if defined(TILEWISE_CUDA)
  require(dtype != ScalarType::Double, kOp, "expected x to be float32, bfloat16 or float16 on a GPU, got Double");
#else
  require(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp,
          "expected x to be float32 or float64 on a CPU, got ", toString(dtype));
#endif
  require(problem.guide_x.has_value() == problem.guide_y.has_value(), kOp,
          "expected guide_x and guide_y together, got one of them");
  if (problem.guide_x.has_value()) {
    check_pair(*problem.guide_x, *problem.guide_y, "guide_x", "guide_y");
    require_dtype(*problem.guide_x, dtype, kOp, "guide_x");
    require(problem.guide_x->size(0) == problem.x.size(0) && problem.guide_y->size(0) == problem.y.size(0), kOp,
            "expected as many rows in guide_x and guide_y as in x and y, got shapes ", shape_of(*problem.guide_x),
            " and ", shape_of(*problem.guide_y));
  }
  require(problem.chunk_bytes >= 0, kOp, "expected chunk_bytes not below 0, got ", problem.chunk_bytes);
}

int64_t rows_at_a_time(const Problem& problem) {
  const int64_t item_bytes = statistics_type(problem.x) == ScalarType::Double ? 8 : 4;
  return pair_rows_at_a_time(problem.x.size(0), problem.y.size(0), item_bytes, problem.chunk_bytes, kOnGpu);
}

template <typename T>
PairwiseChunk<T> whole(const Problem& problem) {
  PairwiseChunk<T> chunk;
  chunk.program = program_of(problem);
  chunk.columns = problem.y.size(0);
  chunk.relations.x_labels = labels_of(problem.x_labels, problem.x, "x_labels");
  chunk.relations.y_labels = labels_of(problem.y_labels, problem.y, "y_labels");
  chunk.relations.excludes_self = problem.self_offset.has_value();
  // Beyond these no row has a column of its own, and the sum of offset and row fits.
  chunk.relations.self_offset =
      std::clamp<int64_t>(problem.self_offset.value_or(0), -problem.x.size(0), problem.y.size(0));
  chunk.relations.guide_margin = static_cast<T>(problem.guide_margin);
  for (size_t i = 0; i < problem.parameters.size(); ++i) chunk.parameters[i] = static_cast<T>(problem.parameters[i]);
  const auto number = [&](const Tensor& tensor, const char* name) {
    return dense<T>(tensor, {}, statistics_type(problem.x), kOp, name);
  };
  chunk.scale = number(problem.scale, "scale");
  if (problem.bias.has_value()) chunk.bias = number(*problem.bias, "bias");
  return chunk;
}

// What a GPU compares instead of the labels of y.
class ShortLabelTensors {
 public:
#if defined(TILEWISE_CUDA)
  ShortLabelTensors(const Tensor& like, Relations<float>& relations, int64_t columns)
      : shorts_(new_output(like, {columns}, ScalarType::Int)), too_long_(new_output(like, {}, ScalarType::Int)) {
    torch::stable::zero_(too_long_);
    const ShortLabels labels{relations.y_labels, columns, static_cast<int32_t*>(shorts_.data_ptr()),
                             static_cast<int32_t*>(too_long_.data_ptr())};
    require_launched(short_labels_cuda(labels, current_stream(like)), kOp);
    relations.short_labels = labels.shorts;
    relations.too_long = labels.too_long;
  }

 private:
  Tensor shorts_, too_long_;
#else
  template <typename T>
  ShortLabelTensors(const Tensor&, Relations<T>&, int64_t) {}
#endif
};

// Between rows that begin at multiples of 16 bytes on a GPU, which reads them by vectors.
int64_t pitch_of(int64_t columns) { return kOnGpu ? (columns + 7) / 8 * 8 : columns; }

Tensor row_buffer(const Tensor& like, int64_t rows, int64_t columns) {
  return columns_of(new_output(like, {rows, pitch_of(columns)}, statistics_type(like)), 0, columns);
}

template <typename T>
void run(const PairwiseChunk<T>& chunk, [[maybe_unused]] const Tensor& like) {
#if defined(TILEWISE_CUDA)
  require_launched(pairwise_cuda(chunk, current_stream(like)), kOp);
#else
  const PairwiseKernels& kernels = selected_pairwise_kernels();
  const int64_t grain = 1 + 32768 / std::max<int64_t>(1, chunk.columns);
  torch::stable::parallel_for(0, chunk.rows, grain, [&](int64_t begin, int64_t end) {
    if constexpr (sizeof(T) == sizeof(double)) {
      kernels.run_double(chunk, begin, end);
    } else {
      kernels.run_float(chunk, begin, end);
    }
  });
#endif
}

// Row losses, and the gradients with the upstream of each row.
template <typename T>
Gradients run_chunks(const Problem& problem, const LossOutputs& outputs, const Upstream<T>& upstream,
                     const Wanted& wanted) {
  const int64_t n = problem.x.size(0), m = problem.y.size(0), rows = rows_at_a_time(problem);
  GradientProducts gradients(problem.x, problem.y, wanted.x, wanted.y, rows, pitch_of(m), problem.chunk_bytes);
  Tensor bias_rows = torch::stable::new_empty(problem.x, {wanted.any() ? n : 0}, statistics_type(problem.x));
  if (n == 0 || m == 0) {
    torch::stable::zero_(gradients.grad_x);
    torch::stable::zero_(gradients.grad_y);
    torch::stable::zero_(bias_rows);
  }
  const Tensor buffer = row_buffer(problem.x, rows, m);
  const RowProducts products(problem.x, rows, m);
  std::optional<Tensor> guide;
  std::optional<RowProducts> guide_products;
  if (problem.guide_x.has_value()) {
    guide = row_buffer(problem.x, rows, m);
    guide_products.emplace(*problem.guide_x, rows, m);
  }
  PairwiseChunk<T> all = whole<T>(problem);
  const ShortLabelTensors labels(problem.x, all.relations, m);
  for (int64_t begin = 0; begin < n; begin += rows) {
    const int64_t count = std::min(rows, n - begin);
    const Tensor similarities = rows_of(buffer, 0, count);
    PairwiseChunk<T> chunk = all;
    if (m > 0) products.form(similarities, rows_of(problem.x, begin, count), problem.y);
    if (guide.has_value() && m > 0) {
      const Tensor part = rows_of(*guide, 0, count);
      guide_products->form(part, rows_of(*problem.guide_x, begin, count), *problem.guide_y);
      chunk.relations.guide = static_cast<const T*>(part.data_ptr());
      chunk.relations.guide_stride = part.stride(0);
    }
    chunk.similarities = static_cast<T*>(similarities.data_ptr());
    chunk.rows = count;
    chunk.row_stride = similarities.stride(0);
    chunk.relations.x_labels += begin;
    chunk.relations.self_offset += begin;
    chunk.loss_rows = outputs.loss_rows<T>() + begin;
    chunk.active_rows = outputs.share_rows<T>() + begin;
    chunk.wants_gradient = wanted.any();
    const Tensor g = gradients.place_of(similarities, begin);
    chunk.gradient = g.data_ptr();
    chunk.gradient_dtype = row_matrix(g, kOp, "gradient").dtype;
    chunk.upstream = upstream;
    if (chunk.upstream.grad_loss != nullptr) chunk.upstream.grad_loss += begin * upstream.stride;
    if (wanted.any()) chunk.bias_rows = static_cast<T*>(bias_rows.data_ptr()) + begin;
    run(chunk, problem.x);
    if (m > 0) gradients.add(similarities, begin);
  }
  return {gradients.grad_x, gradients.grad_y, bias_rows};
}

struct Reduced {
  Reduction kind;
  double divisor;  // of the sum
};

// "mean" divides by the number of rows, "mean_active" by that of active rows: the engine's own mean.
Reduced parse_pair_reduction(const std::string& reduction, int64_t rows) {
  if (reduction == "mean") return {Reduction::kSum, static_cast<double>(std::max<int64_t>(1, rows))};
  if (reduction == "mean_active") return {Reduction::kMean, 1.0};
  require(reduction == "none" || reduction == "sum", kOp,
          "expected reduction to be 'none', 'sum', 'mean' or 'mean_active', got '", reduction, "'");
  return {reduction == "none" ? Reduction::kNone : Reduction::kSum, 1.0};
}

template <typename T>
void reduce(const RowReduction<T>& reduction, [[maybe_unused]] const Tensor& like) {
#if defined(TILEWISE_CUDA)
  require_launched(pairwise_reduction_cuda(reduction, current_stream(like)), kOp);
#else
  reduce_rows(reduction);
#endif
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& y, const Tensor& x_labels, const Tensor& y_labels, const Tensor& scale,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& guide_x, const std::optional<Tensor>& guide_y,
    const std::string& loss, const std::vector<double>& parameters, std::optional<int64_t> self_offset,
    double guide_margin, const std::string& reduction, int64_t chunk_bytes, bool form_x_grad, bool form_y_grad,
    bool form_bias_grad) {
  const Problem problem{x,       y,    x_labels,   y_labels,    scale,        bias,       guide_x,
                        guide_y, loss, parameters, self_offset, guide_margin, chunk_bytes};
  check(problem);
  const DeviceScope scope(x);
  const Reduced reduced = parse_pair_reduction(reduction, x.size(0));
  // As forms_gradients of pysrc/ops/formed.py has it.
  const bool formed = reduced.kind != Reduction::kNone && x.scalar_type() != ScalarType::Half;
  const Wanted wanted{formed && form_x_grad, formed && form_y_grad, formed && form_bias_grad};
  const LossOutputs outputs(x, reduced.kind, 0);
  return with_statistics(x, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const Tensor one = torch::stable::new_empty(x, {}, statistics_type(x));
    torch::stable::fill_(one, 1.0);
    const Upstream<T> upstream{.grad_loss = static_cast<const T*>(one.data_ptr())};
    const Gradients gradients = run_chunks<T>(problem, outputs, upstream, wanted);
    RowReduction<T> sum = outputs.reduction<T>();
    sum.divisor = static_cast<T>(reduced.divisor);
    reduce(sum, x);
    return {outputs.loss, outputs.state, gradients.x, gradients.y, gradients.bias};
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& x, const Tensor& y,
                                            const Tensor& x_labels, const Tensor& y_labels, const Tensor& scale,
                                            const std::optional<Tensor>& bias, const std::optional<Tensor>& guide_x,
                                            const std::optional<Tensor>& guide_y, const Tensor& total,
                                            const std::string& loss, const std::vector<double>& parameters,
                                            std::optional<int64_t> self_offset, double guide_margin,
                                            const std::string& reduction, int64_t chunk_bytes, bool x_grad, bool y_grad,
                                            bool bias_grad) {
  const Problem problem{x,       y,    x_labels,   y_labels,    scale,        bias,       guide_x,
                        guide_y, loss, parameters, self_offset, guide_margin, chunk_bytes};
  check(problem);
  const DeviceScope scope(x);
  const Reduced reduced = parse_pair_reduction(reduction, x.size(0));
  const LossOutputs outputs(x, Reduction::kNone, 0);  // the losses again, for nobody
  const Gradients gradients = with_statistics(x, [&](auto zero) {
    using T = decltype(zero);
    Upstream<T> upstream =
        upstream_of<T>(grad_loss, x, nullptr, dense<T>(total, {}, statistics_type(x), kOp, "total"), reduced.kind, kOp);
    upstream.divisor = static_cast<T>(reduced.divisor);
    return run_chunks<T>(problem, outputs, upstream, {x_grad, y_grad, bias_grad});
  });
  return {gradients.x, gradients.y, gradients.bias};
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_IMPL(tilewise, TILEWISE_DISPATCH_KEY, m) {
  TILEWISE_IMPL(m, "pairwise_loss", tilewise::forward);
  TILEWISE_IMPL(m, "pairwise_loss_backward", tilewise::backward);
}
