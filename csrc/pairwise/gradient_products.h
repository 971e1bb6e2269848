// What the gradients G of chunks of similarities S = X Y^T, which come one after the other, add to those of x and y:
//
//   grad_x = G Y    grad_y += G^T X
//
// On a GPU 16-bit G are kept of several chunks (pair_gradient_rows), for every product reads and writes a sum.
#pragma once

#include "common/gemm.h"
#include "pairwise/chunks.h"

namespace tilewise {

class GradientProducts {
 public:
  Tensor grad_x, grad_y;  // empty where not wanted

  // pitch: between rows of 16-bit G
  GradientProducts(const Tensor& x, const Tensor& y, bool wants_x, bool wants_y, int64_t rows_at_a_time, int64_t pitch,
                   int64_t chunk_bytes)
      : grad_x(gradient_of(x, wants_x)), grad_y(gradient_of(y, wants_y)), x_(x), y_(y), kept_(rows_at_a_time) {
    if (wants_y) y_sum_.emplace(grad_y);
    if ((!wants_x && !wants_y) || x.scalar_type() == statistics_type(x)) return;
    kept_ = pair_gradient_rows(rows_at_a_time, y.size(0), static_cast<int64_t>(x.element_size()), chunk_bytes);
    narrow_ = columns_of(new_output(x, {std::min(kept_, x.size(0)), pitch}, x.scalar_type()), 0, y.size(0));
  }

  // Where G of the rows from `begin` on is written: over their similarities, or in 16 bits behind that of rows before.
  Tensor place_of(const Tensor& similarities, int64_t begin) const {
    return narrow_.has_value() ? rows_of(*narrow_, begin % kept_, similarities.size(0)) : similarities;
  }

  // G of these rows is there.
  void add(const Tensor& similarities, int64_t begin) {
    const int64_t before = begin % kept_, count = before + similarities.size(0), end = begin + similarities.size(0);
    if (count < kept_ && end < x_.size(0)) return;
    const Tensor g = narrow_.has_value() ? rows_of(*narrow_, 0, count) : similarities;
    if (grad_x.dim() == 2) {
      const Tensor out = rows_of(grad_x, begin - before, count);
      add_product(out, out, g, y_, 0.0);
    }
    if (y_sum_.has_value())
      y_sum_->add(transposed(g), rows_of(x_, begin - before, count), begin == before, end == x_.size(0));
  }

 private:
  static Tensor gradient_of(const Tensor& vectors, bool is_wanted) {
    const auto shape = is_wanted ? std::vector{vectors.size(0), vectors.size(1)} : std::vector<int64_t>{0};
    return torch::stable::new_empty(vectors, shape, vectors.scalar_type());
  }

  Tensor x_, y_;
  int64_t kept_;
  std::optional<Tensor> narrow_;
  std::optional<ProductSum> y_sum_;
};

}  // namespace tilewise
