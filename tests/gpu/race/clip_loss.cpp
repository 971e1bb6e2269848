// clip_loss: tiles whole and cut, rows of any alignment, chunks that join, every type of the gradient.
#include "clip_loss/clip_loss.h"

#include <array>

#include "race.h"

namespace race {
namespace {

using tilewise::Dtype;

struct Case {
  int64_t pairs, held;
  Dtype gradient;
  bool by_row;
};
constexpr std::array kCases = {
    Case{1, 1, Dtype::kFloat32, false},     Case{40, 16, Dtype::kFloat32, true},
    Case{40, 40, Dtype::kBFloat16, true},   Case{264, 100, Dtype::kFloat16, false},
    Case{301, 301, Dtype::kFloat32, false}, Case{1100, 70, Dtype::kBFloat16, true},
};

// The state, which the chunks and then the end write.
void forward(const Case& of, Memory& memory, ClipCall op, const std::string& what) {
  const int64_t parts = of.held * tilewise::clip_strips(of.pairs) + tilewise::clip_bands(of.held) * of.pairs;
  op.parts = memory.scratch(2 * parts);
  for (op.first = 0; op.first < of.pairs; op.first += of.held) {
    op.rows = std::min(of.held, of.pairs - op.first);
    const Memory nothing;
    call(what + " statistics", nothing, [&] { return clip_statistics(op); });
  }
  op.loss_rows = memory.output(of.pairs);
  op.share_rows = memory.output(of.pairs);
  op.loss = memory.output(1);
  op.total = memory.output(1);
  call(what + " finish", memory, [&] { return clip_finish(op); });
}

}  // namespace

void clip_loss_calls() {
  for (const Case& of : kCases) {
    const std::string what = "clip_loss of " + std::to_string(of.pairs);
    Memory memory;
    ClipCall op{.columns = of.pairs};
    op.similarities = memory.numbers(of.held * of.pairs);
    op.scale = memory.filled(1, 9.0f);
    op.state = memory.output(tilewise::kClipState * of.pairs);
    forward(of, memory, op, what);
    op.rows = of.held;
    op.grad_loss = of.by_row ? memory.numbers(of.pairs) : nullptr;
    op.gradient_dtype = static_cast<int64_t>(of.gradient);
    const bool in_place = of.gradient == Dtype::kFloat32;
    op.gradient = in_place ? op.similarities : memory.output(of.gradient, of.held * of.pairs);
    call(what + " gradient", memory, [&] { return clip_gradient(op); });
  }
}

}  // namespace race
