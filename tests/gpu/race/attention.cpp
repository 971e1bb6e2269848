// mala: forward and backward, of one tile and of several, of one run of chunks and of two.
#include <array>

#include "race.h"

namespace race {
namespace {

using tilewise::Dtype;

struct Case {
  int64_t tokens, heads, key_heads, features, values;
  Dtype dtype = Dtype::kFloat32;
};
constexpr std::array kCases = {
    Case{0, 2, 2, 16, 40},
    Case{5, 2, 1, 0, 8},
    Case{1, 2, 2, 2, 1},
    Case{70, 2, 2, 16, 40},
    Case{70, 2, 1, 16, 40, Dtype::kBFloat16},
    Case{33, 2, 1, 70, 40},
    Case{33, 1, 1, 130, 4},
    Case{260, 1, 1, 8, 8},
};

struct Option {
  bool causal, rotates, starts, packed;
};
constexpr std::array kOptions = {
    Option{false, false, false, false}, Option{false, true, false, false}, Option{true, false, true, false},
    Option{true, true, false, false},   Option{false, true, false, true},  Option{true, false, true, true},
};

// Of (tokens, width) heads, one after another.
TokenCall tokens_of(void* data, int64_t heads, int64_t tokens, int64_t width) {
  return {.data = data, .batch = heads * tokens * width, .head = tokens * width, .token = width};
}

AttentionCall attention_call(Memory& memory, const Case& of, const Option& option) {
  AttentionCall call{.dtype = static_cast<int64_t>(of.dtype), .sequences = 1, .heads = of.heads};
  call.key_heads = of.key_heads;
  call.queries = call.keys = of.tokens;
  call.features = of.features;
  call.values = of.values;
  call.causal = option.causal ? 1 : 0;
  call.seen = option.starts ? 3 : 0;
  call.scale = 0.25;
  call.eps = 1e-6;
  const auto in = [&](int64_t heads, int64_t width) {
    return tokens_of(memory.numbers(of.dtype, heads * of.tokens * width), heads, of.tokens, width);
  };
  const auto out = [&](int64_t heads, int64_t width) {
    return tokens_of(memory.output(of.dtype, heads * of.tokens * width), heads, of.tokens, width);
  };
  call.q = in(of.heads, of.features);
  call.k = in(of.key_heads, of.features);
  call.v = in(of.key_heads, of.values);
  call.out = out(of.heads, of.values);
  call.grad_q = out(of.heads, of.features);
  call.grad_k = out(of.key_heads, of.features);
  call.grad_v = out(of.key_heads, of.values);
  if (option.rotates) {
    call.cos = memory.numbers(of.tokens * of.features / 2);
    call.sin = memory.numbers(of.tokens * of.features / 2);
  }
  if (option.packed) {  // a sequence of no tokens among them
    call.sequences = 3;
    int64_t* bounds = memory.integers(4, 1);
    bounds[1] = bounds[2] = of.tokens / 3;
    bounds[3] = of.tokens;
    call.q_bounds = call.k_bounds = bounds;
  }
  const int64_t lines = call.sequences * of.key_heads;
  if (option.starts) {
    call.start_s = memory.numbers(lines * of.features * of.values);
    call.start_z = memory.numbers(lines * of.features, 0.5f, 1.0f);
    call.start_u = memory.numbers(lines * of.values);
  }
  call.s = memory.output(lines * of.features * of.values);
  call.z = memory.output(lines * of.features);
  call.u = memory.output(lines * of.values);
  return call;
}

std::string named(const Case& of, const Option& option) {
  return std::to_string(of.tokens) + " tokens, " + std::to_string(of.heads) + " heads of " +
         std::to_string(of.key_heads) + ", " + std::to_string(of.features) + " features" +
         (option.causal ? ", causal" : "") + (option.rotates ? ", rotated" : "") + (option.packed ? ", packed" : "");
}

}  // namespace

void attention_calls() {
  for (const Case& of : kCases) {
    for (const Option& option : kOptions) {
      Memory memory;
      AttentionCall heads = attention_call(memory, of, option);
      call(named(of, option), memory, [&] {
        const char* error = attention(heads);
        if (error != nullptr) return error;
        heads.grad_out =
            tokens_of(memory.numbers(of.dtype, of.heads * of.tokens * of.values), of.heads, of.tokens, of.values);
        return attention(heads);
      });
    }
  }
}

}  // namespace race
