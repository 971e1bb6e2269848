// clip_loss, a chunk of rows of the similarities at a time (clip_loss.h): a product forms it, forward for its
// statistics and backward for its gradient, which enters two more products. The gradients are those of z = S: a caller
// multiplies them by the scale.
#include "clip_loss/clip_loss.h"

#include <algorithm>

#include "common/operator.h"
#include "pairwise/gradient_products.h"
#include "rows/rows_bind.h"

namespace tilewise {
namespace {

constexpr const char* kOp = "clip_loss";

struct Problem {
  const Tensor& image;
  const Tensor& text;
  const Tensor& logit_scale;
  int64_t chunk_bytes;
};

void check(const Problem& problem) {
  const RowMatrix image = row_matrix(problem.image, kOp, "image");
  if constexpr (kOnGpu) {
    require(image.dtype != Dtype::kFloat64, kOp,
            "expected image to be float32, bfloat16 or float16 on a GPU, got Double");
  } else {
    require(image.dtype == Dtype::kFloat32 || image.dtype == Dtype::kFloat64, kOp,
            "expected image to be float32 or float64 on a CPU, got ", toString(problem.image.scalar_type()));
  }
  require_shape(problem.text, {image.rows, image.columns}, kOp, "text");
  require_dtype(problem.text, problem.image.scalar_type(), kOp, "text");
  require_shape(problem.logit_scale, {}, kOp, "logit_scale");
  require_dtype(problem.logit_scale, statistics_type(problem.image), kOp, "logit_scale");
  require(problem.chunk_bytes >= 0, kOp, "expected chunk_bytes not below 0, got ", problem.chunk_bytes);
}

template <typename T>
int64_t rows_at_a_time(const Problem& problem) {
  const int64_t n = problem.image.size(0);
  return pair_rows_at_a_time(n, n, sizeof(T), problem.chunk_bytes, kOnGpu);
}

// Calls f(chunk, similarities) after they are formed.
template <typename T, typename Function>
void for_chunks(const Problem& problem, const ClipState<T>& state, Function f) {
  const int64_t n = problem.image.size(0);
  const int64_t rows = rows_at_a_time<T>(problem);
  const Tensor buffer = new_output(problem.image, {rows, n}, statistics_type(problem.image));
  const RowProducts products(problem.image, rows, n);
  for (int64_t begin = 0; begin < n; begin += rows) {
    const int64_t count = std::min(rows, n - begin);
    const Tensor similarities = rows_of(buffer, 0, count);
    products.form(similarities, rows_of(problem.image, begin, count), problem.text);
    ClipChunk<T> chunk{.similarities = static_cast<T*>(similarities.data_ptr())};
    chunk.first = begin;
    chunk.rows = count;
    chunk.columns = n;
    chunk.scale = static_cast<const T*>(problem.logit_scale.data_ptr());
    chunk.state = state;
    f(chunk, similarities);
  }
}

#if defined(TILEWISE_CUDA)

// The memory where tiles meet is that of the first chunk, which is the largest.
class Statistics {
 public:
  explicit Statistics(const Tensor& like) : like_(like) {}

  void take(const ClipChunk<float>& chunk) {
    const int64_t of_rows = chunk.rows * clip_strips(chunk.columns);
    const int64_t bytes =
        (of_rows + clip_bands(chunk.rows) * chunk.columns) * static_cast<int64_t>(sizeof(ClipPart<float>));
    if (!memory_.has_value()) memory_ = new_output(like_, {bytes}, ScalarType::Byte);
    auto* parts = static_cast<ClipPart<float>*>(memory_->data_ptr());
    require_launched(clip_statistics_cuda(chunk, {parts, parts + of_rows}, current_stream(like_)), kOp);
  }

 private:
  const Tensor& like_;
  std::optional<Tensor> memory_;
};

void finish(const ClipLosses<float>& losses, const RowReduction<float>& reduction, const Tensor& like) {
  require_launched(clip_finish_cuda(losses, reduction, current_stream(like)), kOp);
}

void write_gradient(const ClipChunk<float>& chunk, const Tensor& like) {
  require_launched(clip_gradient_cuda(chunk, current_stream(like)), kOp);
}

#else

// Shares of at least 32 Ki elements.
int64_t grain_of(int64_t length) { return 1 + 32768 / std::max<int64_t>(1, length); }

class Statistics {
 public:
  explicit Statistics(const Tensor&) {}

  template <typename T>
  void take(const ClipChunk<T>& chunk) {
    const ClipKernels<T>& kernels = selected_clip_kernels().of<T>();
    torch::stable::parallel_for(0, chunk.rows, grain_of(chunk.columns),
                                [&](int64_t begin, int64_t end) { kernels.take_rows(chunk, begin, end); });
    torch::stable::parallel_for(0, chunk.columns, grain_of(chunk.rows),
                                [&](int64_t begin, int64_t end) { kernels.take_columns(chunk, begin, end); });
  }
};

template <typename T>
void finish(const ClipLosses<T>& losses, const RowReduction<T>& reduction, const Tensor&) {
  selected_clip_kernels().of<T>().finish(losses, 0, losses.rows);
  reduce_rows(reduction);
}

template <typename T>
void write_gradient(const ClipChunk<T>& chunk, const Tensor&) {
  const ClipKernels<T>& kernels = selected_clip_kernels().of<T>();
  torch::stable::parallel_for(0, chunk.rows, grain_of(chunk.columns),
                              [&](int64_t begin, int64_t end) { kernels.gradient(chunk, begin, end); });
}

#endif

std::tuple<Tensor, Tensor> forward(const Tensor& image, const Tensor& text, const Tensor& logit_scale,
                                   const std::string& reduction, int64_t chunk_bytes) {
  const Problem problem{image, text, logit_scale, chunk_bytes};
  check(problem);
  const DeviceScope scope(image);
  const LossOutputs outputs(image, parse_reduction(reduction, kOp), kClipState);
  with_statistics(image, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = image.size(0);
    const ClipState<T> state = clip_state(outputs.row_state<T>(), n);
    Statistics statistics(image);
    for_chunks<T>(problem, state, [&](const ClipChunk<T>& chunk, const Tensor&) { statistics.take(chunk); });
    finish(ClipLosses<T>{state, outputs.loss_rows<T>(), outputs.share_rows<T>(), n}, outputs.reduction<T>(), image);
  });
  return {outputs.loss, outputs.state};
}

std::tuple<Tensor, Tensor> backward(const Tensor& image, const Tensor& text, const Tensor& logit_scale,
                                    const Tensor& state, const std::optional<Tensor>& grad_loss, int64_t chunk_bytes,
                                    bool image_grad, bool text_grad) {
  const Problem problem{image, text, logit_scale, chunk_bytes};
  check(problem);
  const DeviceScope scope(image);
  const int64_t n = image.size(0);
  return with_statistics(image, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    GradientProducts gradients(image, text, image_grad, text_grad, rows_at_a_time<T>(problem), n, chunk_bytes);
    // The maxima and weights are read alone.
    T* lines = const_cast<T*>(state_of<T>(state, image, kClipState, kOp));
    const T* upstream = dense<T>(grad_loss, {n}, statistics_type(image), kOp, "grad_loss");
    if (image_grad || text_grad) {
      for_chunks<T>(problem, clip_state(lines, n), [&](ClipChunk<T> chunk, const Tensor& similarities) {
        const Tensor g = gradients.place_of(similarities, chunk.first);
        chunk.grad_loss = upstream;
        chunk.gradient = g.data_ptr();
        chunk.gradient_dtype = *storage_of(g);
        write_gradient(chunk, image);
        gradients.add(similarities, chunk.first);
      });
    }
    return {gradients.grad_x, gradients.grad_y};
  });
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_IMPL(tilewise, TILEWISE_DISPATCH_KEY, m) {
  TILEWISE_IMPL(m, "clip_loss", tilewise::forward);
  TILEWISE_IMPL(m, "clip_loss_backward", tilewise::backward);
}
