// The launches of one call on a GPU, in order, and the scratch memory between them (host only, raw pointers).
#pragma once

#include <algorithm>

#include "mala/mala.h"

namespace tilewise {

class MalaLaunches {
 public:
  // Tensors, sizes and options of `call` are set. scratch has room for scratch_floats().
  MalaLaunches(const MalaCall& call, float* scratch, void* stream) : call_(call), next_(scratch), stream_(stream) {
    call_.run = run_of(call);
  }

  static int64_t scratch_floats(const MalaCall& call, bool backward) {
    const int64_t state = state_floats(call);
    const int64_t keys = call.sequences * call.key_heads * shares_of(call, call.keys) * state;
    if (!backward) return keys;
    const int64_t queries = call.sequences * call.heads * shares_of(call, call.queries) * state;
    const int64_t totals = call.causal ? keys : call.sequences * call.key_heads * state;
    return totals + queries + 3 * coefficients(call) + (grouped(call) ? group_floats(call) : 0);
  }

  // start: sums of earlier keys, or null. total: of all keys, written.
  const char* forward(const MalaSums<float>& start, const MalaSums<float>& total) {
    const char* error = sum_keys(start, total);
    if (error == nullptr) error = mala_forward_cuda(call_, stream_);
    return error;
  }

  // sums: of all keys; causal those of earlier keys, or null. Gradients are contiguous.
  const char* backward(const MalaSums<float>& sums) {
    call_.sums = sums;
    const char* error = call_.causal ? sum_keys(sums, {}) : nullptr;
    if (error != nullptr) return error;
    call_.coefficients = take(3 * coefficients(call_));
    error = mala_query_gradient_cuda(call_, stream_);
    if (error != nullptr) return error;
    MalaShares shares = new_shares(call_.queries, call_.heads);
    shares.of_queries = true;
    error = mala_sums_cuda(call_, shares, stream_);
    if (error != nullptr) return error;
    if (call_.causal) {
      call_.grad_sums = shares.parts;
      error = scan(shares.parts, {}, {}, call_.sequences * call_.heads, shares.shares, true, false);
    } else {
      call_.grad_sums = new_sums(call_.sequences * call_.key_heads);
      error = scan(shares.parts, {}, call_.grad_sums, call_.sequences * call_.key_heads,
                   call_.heads / call_.key_heads * shares.shares, false, true);
    }
    if (error != nullptr) return error;
    return grouped(call_) ? grouped_key_gradient() : key_gradient();
  }

 private:
  static int64_t state_floats(const MalaCall& call) {
    return call.features * call.values + call.features + call.values;
  }
  static int64_t chunks_of(int64_t tokens) { return tokens > 0 ? (tokens + kMalaChunk - 1) / kMalaChunk : 1; }
  // Causal, a block takes S, Z and U along from chunk to chunk if they are one tile; else it keeps what it has loaded
  // of them, as far as there are enough blocks.
  static int64_t run_of(const MalaCall& call) {
    constexpr int64_t kMost = 4, kEnough = 2048;
    const int64_t chunks = call.sequences * call.heads * chunks_of(call.queries);
    if (call.causal) return (has_tiles(call) ? 1 : kMost) * kMalaChunk;
    return std::clamp<int64_t>(chunks / kEnough, 1, kMost) * kMalaChunk;
  }
  // Causal, a share is a run; else there are at most 16.
  static int64_t share_of(const MalaCall& call, int64_t tokens) {
    return call.causal ? run_of(call) : (chunks_of(tokens) + 15) / 16 * kMalaChunk;
  }
  static int64_t shares_of(const MalaCall& call, int64_t tokens) {
    return (chunks_of(tokens) * kMalaChunk + share_of(call, tokens) - 1) / share_of(call, tokens);
  }
  static int64_t batch(const MalaCall& call) { return call.q_bounds == nullptr ? call.sequences : 1; }
  static int64_t coefficients(const MalaCall& call) { return batch(call) * call.heads * call.queries; }
  static bool grouped(const MalaCall& call) { return call.causal && call.heads != call.key_heads; }
  static int64_t group_floats(const MalaCall& call) {
    return batch(call) * call.heads * call.keys * (call.features + call.values);
  }

  float* take(int64_t floats) {
    float* begin = next_;
    next_ += floats;
    return begin;
  }

  MalaSums<float> new_sums(int64_t lines) {
    MalaSums<float> sums;
    sums.s = take(lines * call_.features * call_.values);
    sums.z = take(lines * call_.features);
    sums.u = take(lines * call_.values);
    return sums;
  }

  MalaShares new_shares(int64_t tokens, int64_t heads) {
    MalaShares shares;
    shares.share = share_of(call_, tokens);
    shares.shares = shares_of(call_, tokens);
    shares.parts = new_sums(call_.sequences * heads * shares.shares);
    return shares;
  }

  const char* scan(const MalaSums<float>& parts, const MalaSums<float>& start, const MalaSums<float>& total,
                   int64_t lines, int64_t count, bool back, bool total_only) {
    const auto one = [&](float* values, const float* first, float* sum, int64_t width) {
      return mala_scan_cuda({values, first, sum, lines, count, width, back, total_only}, stream_);
    };
    const char* error = one(parts.s, start.s, total.s, call_.features * call_.values);
    if (error == nullptr) error = one(parts.z, start.z, total.z, call_.features);
    if (error == nullptr) error = one(parts.u, start.u, total.u, call_.values);
    return error;
  }

  const char* sum_keys(const MalaSums<float>& start, const MalaSums<float>& total) {
    const MalaShares shares = new_shares(call_.keys, call_.key_heads);
    const char* error = mala_sums_cuda(call_, shares, stream_);
    if (error != nullptr) return error;
    call_.sums = call_.causal ? shares.parts : total;
    return scan(shares.parts, start, total, call_.sequences * call_.key_heads, shares.shares, false, !call_.causal);
  }

  const char* key_gradient() {
    call_.grad_dtype = call_.dtype;
    return mala_key_gradient_cuda(call_, stream_);
  }

  // Each query head's part in float32, then their sums.
  const char* grouped_key_gradient() {
    MalaCall parts = call_;
    const auto place = [&](int64_t width) {
      const int64_t head = call_.keys * width;
      return TokenTensor{take(batch(call_) * call_.heads * head), call_.heads * head, head, width};
    };
    parts.grad_dtype = Dtype::kFloat32;
    parts.grad_k = place(call_.features);
    parts.grad_v = place(call_.values);
    const char* error = mala_key_gradient_cuda(parts, stream_);
    const auto sum = [&](const TokenTensor& from, const TokenTensor& to, int64_t width) {
      return mala_group_sum_cuda({static_cast<const float*>(from.data), to.data, call_.dtype,
                                  batch(call_) * call_.key_heads, call_.heads / call_.key_heads, call_.keys * width},
                                 stream_);
    };
    if (error == nullptr) error = sum(parts.grad_k, call_.grad_k, call_.features);
    if (error == nullptr) error = sum(parts.grad_v, call_.grad_v, call_.values);
    return error;
  }

  MalaCall call_;
  float* next_;
  void* stream_;
};

}  // namespace tilewise
