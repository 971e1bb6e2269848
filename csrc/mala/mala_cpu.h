// mala on the CPU: heads and segments of their tokens over torch's threads (host only).
#pragma once

#include "mala/mala.h"
#include "mala/mala_bind.h"

namespace tilewise {

constexpr int64_t kSegment = 4096;  // tokens of one task; fixed, so that sums do not depend on the number of threads

template <typename T>
class Heads {
 public:
  Heads(const Attention& attention, const Sums& sums) : attention_(attention), sums_(sums) {}

  int64_t d() const { return attention_.q.size(3); }
  int64_t dv() const { return attention_.v.size(3); }
  int64_t sums_size() const { return d() * dv() + d() + dv(); }

  // The head of queries `head` of a sequence, with its keys; gradients and outputs are the caller's to set.
  MalaHead<T> of(int64_t sequence, int64_t head) const {
    const bool packed = attention_.q_bounds.has_value();
    const int64_t batch = packed ? 0 : sequence;
    const int64_t key_head = head / attention_.group();
    const auto bounds = [&](const std::optional<Tensor>& at, int64_t tokens) {
      if (!packed) return std::pair<int64_t, int64_t>{0, tokens};
      const int64_t* data = static_cast<const int64_t*>(at->data_ptr());
      return std::pair<int64_t, int64_t>{data[sequence], data[sequence + 1]};
    };
    const auto [q_begin, q_end] = bounds(attention_.q_bounds, attention_.q.size(2));
    const auto [k_begin, k_end] = bounds(attention_.k_bounds, attention_.k.size(2));
    MalaHead<T> result;
    result.queries = q_end - q_begin;
    result.keys = k_end - k_begin;
    result.features = d();
    result.values = dv();
    result.scale = static_cast<T>(attention_.scale);
    result.eps = static_cast<T>(attention_.eps);
    result.seen = attention_.seen;
    result.q = tokens<const T>(attention_.q, batch, head, q_begin);
    result.k = tokens<const T>(attention_.k, batch, key_head, k_begin);
    result.v = tokens<const T>(attention_.v, batch, key_head, k_begin);
    if (attention_.cos.has_value()) {
      result.cos = angles(*attention_.cos);
      result.sin = angles(*attention_.sin);
    }
    result.sums = slot(sums_, sequence, key_head);
    return result;
  }

  template <typename U>
  static Tokens<U> tokens(const Tensor& tensor, int64_t batch, int64_t head, int64_t token) {
    return {static_cast<U*>(tensor.data_ptr()) + batch * tensor.stride(0) + head * tensor.stride(1) +
                token * tensor.stride(2),
            tensor.stride(2)};
  }

  // The place in a tensor of the queries or keys of `head`.
  Tokens<T> query_rows(const Tensor& tensor, int64_t sequence, int64_t head) const {
    return placed(tensor, attention_.q_bounds, sequence, head);
  }
  Tokens<T> key_rows(const Tensor& tensor, int64_t sequence, int64_t key_head) const {
    return placed(tensor, attention_.k_bounds, sequence, key_head);
  }

  MalaSums<T> slot(const Sums& sums, int64_t sequence, int64_t key_head) const {
    const int64_t at = sequence * attention_.key_heads() + key_head;
    return {static_cast<T*>(sums.s.data_ptr()) + at * d() * dv(), static_cast<T*>(sums.z.data_ptr()) + at * d(),
            static_cast<T*>(sums.u.data_ptr()) + at * dv()};
  }

 private:
  Tokens<T> placed(const Tensor& tensor, const std::optional<Tensor>& bounds, int64_t sequence, int64_t head) const {
    if (!bounds.has_value()) return tokens<T>(tensor, sequence, head, 0);
    return tokens<T>(tensor, 0, head, static_cast<const int64_t*>(bounds->data_ptr())[sequence]);
  }

  // Positions count from the beginning of each sequence.
  static Tokens<const T> angles(const Tensor& tensor) {
    return {static_cast<const T*>(tensor.data_ptr()), tensor.stride(0)};
  }

  const Attention& attention_;
  const Sums& sums_;
};

// f(sequence, head, segment) for every segment of `tokens` tokens of every head, over torch's threads.
template <typename Function>
void for_segments(int64_t sequences, int64_t heads, int64_t tokens, Function f) {
  const int64_t segments = std::max<int64_t>(1, (tokens + kSegment - 1) / kSegment);
  torch::stable::parallel_for(0, sequences * heads * segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / (heads * segments), i / segments % heads, i % segments);
  });
}

// Sums of each segment of tokens, and their totals in order.
template <typename T>
class SegmentSums {
 public:
  SegmentSums(const Attention& attention, const Heads<T>& heads, int64_t parts)
      : heads_(heads), parts_(parts), key_heads_(attention.key_heads()), sequences_(attention.sequences()) {
    if (parts == 1) return;
    partial_ = torch::stable::new_empty(attention.q, {sequences_ * key_heads_ * parts * heads.sums_size()},
                                        attention.q.scalar_type());
    torch::stable::zero_(*partial_);
  }

  MalaSums<T> part(const Sums& total, int64_t sequence, int64_t key_head, int64_t part) const {
    if (parts_ == 1) return heads_.slot(total, sequence, key_head);
    T* s = static_cast<T*>(partial_->data_ptr()) +
           ((sequence * key_heads_ + key_head) * parts_ + part) * heads_.sums_size();
    return {s, s + heads_.d() * heads_.dv(), s + heads_.d() * heads_.dv() + heads_.d()};
  }

  void add_to(const Sums& total) const {
    if (parts_ == 1) return;
    for_segments(sequences_, key_heads_, 1, [&](int64_t sequence, int64_t key_head, int64_t) {
      const MalaSums<T> sum = heads_.slot(total, sequence, key_head);
      for (int64_t i = 0; i < parts_; ++i) {
        const MalaSums<T> more = part(total, sequence, key_head, i);
        for (int64_t j = 0; j < heads_.d() * heads_.dv(); ++j) sum.s[j] += more.s[j];
        for (int64_t j = 0; j < heads_.d(); ++j) sum.z[j] += more.z[j];
        for (int64_t j = 0; j < heads_.dv(); ++j) sum.u[j] += more.u[j];
      }
    });
  }

 private:
  const Heads<T>& heads_;
  int64_t parts_, key_heads_, sequences_;
  std::optional<Tensor> partial_;
};

inline int64_t segments_of(int64_t tokens) { return std::max<int64_t>(1, (tokens + kSegment - 1) / kSegment); }

template <typename T>
void forward_as(const Attention& attention, const Sums& sums, const Tensor& out) {
  const Heads<T> heads(attention, sums);
  const int64_t n = attention.sequences();
  if (attention.causal) {
    for_segments(n, attention.key_heads(), 1, [&](int64_t sequence, int64_t key_head, int64_t) {
      const int64_t first = key_head * attention.group();
      const MalaSums<T> state = heads.slot(sums, sequence, key_head);
      const int64_t size = heads.sums_size();
      std::vector<T> start(static_cast<size_t>(size));
      const auto copy = [&](bool back) {
        T* at = start.data();
        for (auto [data, count] :
             {std::pair{state.s, heads.d() * heads.dv()}, {state.z, heads.d()}, {state.u, heads.dv()}}) {
          back ? std::copy(at, at + count, data) : std::copy(data, data + count, at);
          at += count;
        }
      };
      copy(false);
      for (int64_t head = first; head < first + attention.group(); ++head) {
        if (head > first) copy(true);
        MalaHead<T> op = heads.of(sequence, head);
        op.out = heads.query_rows(out, sequence, head);
        selected_mala_kernels().of<T>().causal(op);
      }
    });
    return;
  }
  const int64_t segments = segments_of(attention.k.size(2));
  const SegmentSums<T> partial(attention, heads, segments);
  for_segments(n, attention.key_heads(), attention.k.size(2), [&](int64_t sequence, int64_t key_head, int64_t segment) {
    MalaHead<T> op = heads.of(sequence, key_head * attention.group());
    op.sums = partial.part(sums, sequence, key_head, segment);
    selected_mala_kernels().of<T>().sum_keys(op, std::min(op.keys, segment * kSegment),
                                             std::min(op.keys, (segment + 1) * kSegment));
  });
  partial.add_to(sums);
  for_segments(n, attention.heads(), attention.q.size(2), [&](int64_t sequence, int64_t head, int64_t segment) {
    MalaHead<T> op = heads.of(sequence, head);
    op.out = heads.query_rows(out, sequence, head);
    selected_mala_kernels().of<T>().queries(op, std::min(op.queries, segment * kSegment),
                                            std::min(op.queries, (segment + 1) * kSegment));
  });
}

struct Gradients {
  Tensor q, k, v;
};

template <typename T>
void backward_as(const Attention& attention, const Tensor& grad_out, const Sums& sums, const Gradients& gradients) {
  const Heads<T> heads(attention, sums);
  const int64_t n = attention.sequences(), group = attention.group();
  const Sums grad_sums = new_sums(attention);
  const auto prepared = [&](int64_t sequence, int64_t head) {
    MalaHead<T> op = heads.of(sequence, head);
    const Tokens<T> grad = heads.query_rows(grad_out, sequence, head);
    op.grad_out = {grad.data, grad.stride};
    op.grad_q = heads.query_rows(gradients.q, sequence, head);
    op.grad_k = heads.key_rows(gradients.k, sequence, head / group);
    op.grad_v = heads.key_rows(gradients.v, sequence, head / group);
    op.grad_sums = heads.slot(grad_sums, sequence, head / group);
    return op;
  };
  if (attention.causal) {
    for_segments(n, attention.key_heads(), 1, [&](int64_t sequence, int64_t key_head, int64_t) {
      const int64_t size = heads.sums_size(), matrix = heads.d() * heads.dv();
      std::vector<T> state(static_cast<size_t>(2 * size));
      for (int64_t i = 0; i < group; ++i) {
        MalaHead<T> op = prepared(sequence, key_head * group + i);
        std::vector<T> per_query(static_cast<size_t>(3 * op.queries));
        std::copy(op.sums.s, op.sums.s + matrix, state.begin());
        std::copy(op.sums.z, op.sums.z + heads.d(), state.begin() + matrix);
        std::copy(op.sums.u, op.sums.u + heads.dv(), state.begin() + matrix + heads.d());
        std::fill(state.begin() + size, state.end(), T(0));
        op.sums = {state.data(), state.data() + matrix, state.data() + matrix + heads.d()};
        op.grad_sums = {op.sums.s + size, op.sums.z + size, op.sums.u + size};
        op.per_query = per_query.data();
        op.adds = i > 0;
        selected_mala_kernels().of<T>().causal_backward(op);
      }
    });
    return;
  }
  const int64_t segments = segments_of(attention.q.size(2));
  const SegmentSums<T> partial(attention, heads, segments * group);
  for_segments(n, attention.heads(), attention.q.size(2), [&](int64_t sequence, int64_t head, int64_t segment) {
    MalaHead<T> op = prepared(sequence, head);
    op.grad_sums = partial.part(grad_sums, sequence, head / group, head % group * segments + segment);
    selected_mala_kernels().of<T>().backward_queries(op, std::min(op.queries, segment * kSegment),
                                                     std::min(op.queries, (segment + 1) * kSegment));
  });
  partial.add_to(grad_sums);
  for_segments(n, attention.key_heads(), attention.k.size(2), [&](int64_t sequence, int64_t key_head, int64_t segment) {
    const MalaHead<T> op = prepared(sequence, key_head * group);
    selected_mala_kernels().of<T>().backward_keys(op, std::min(op.keys, segment * kSegment),
                                                  std::min(op.keys, (segment + 1) * kSegment));
  });
}

}  // namespace tilewise
