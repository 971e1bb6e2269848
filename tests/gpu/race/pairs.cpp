// Every program of the pairwise engine, with a guide and without.
#include <array>
#include <map>
#include <string_view>

#include "pairwise/programs.h"
#include "race.h"

namespace race {
namespace {

using tilewise::Dtype;

// Those that tests use; programs without any are not listed.
const std::map<std::string_view, std::array<double, tilewise::kPairParameters>> kParameters = {
    {"multi_similarity", {2.0, 50.0, 0.5, 0.1}},
    {"binomial_deviance", {2.0, 10.0, 0.4}},
    {"lifted_structure", {1.0, 0.2}},
    {"contrastive", {0.9, 0.1}},
    {"triplet", {0.2}},
    {"circle", {0.25, 2.0}},
    {"window_log_sum_exp", {-2.0, 0.3, 1.0}},
};

struct Case {
  int64_t rows, columns;
  Dtype gradient;
  bool guided, in_place;
};
constexpr std::array kCases = {
    Case{0, 40, Dtype::kFloat32, false, false},   Case{1, 1, Dtype::kFloat32, false, true},
    Case{9, 40, Dtype::kFloat32, false, true},    Case{9, 40, Dtype::kBFloat16, true, false},
    Case{3, 1500, Dtype::kFloat16, true, false},  Case{3, 1500, Dtype::kFloat32, false, true},
    Case{2, 9000, Dtype::kFloat32, false, false},
};

PairCall pair_call(Memory& memory, const Case& of, const char* loss) {
  const int64_t stride = (of.columns + 3) / 4 * 4, pairs = of.rows * stride;
  PairCall call{.rows = of.rows, .columns = of.columns, .row_stride = stride};
  call.similarities = memory.numbers(pairs);
  call.x_labels = memory.integers(of.rows, 4);
  call.y_labels = memory.integers(of.columns, 4);
  call.short_labels = memory.integers_32(of.columns, 4);
  call.too_long = memory.integers_32(1, 1);
  call.self_offset = 2;
  call.excludes_self = 1;
  if (of.guided) call.guide = memory.numbers(pairs);
  call.guide_stride = stride;
  call.guide_margin = 0.2;
  call.loss = loss;
  const auto given = kParameters.find(loss);
  if (given != kParameters.end()) std::copy(given->second.begin(), given->second.end(), call.parameters);
  call.scale = memory.filled(1, 3.0f);
  call.bias = memory.filled(1, 0.25f);
  call.loss_rows = memory.output(of.rows);
  call.active_rows = memory.output(of.rows);
  call.gradient_dtype = static_cast<int64_t>(of.gradient);
  call.gradient = of.in_place ? call.similarities : memory.output(of.gradient, pairs);
  call.grad_loss = memory.numbers(of.rows);
  call.grad_loss_stride = 1;
  call.bias_rows = memory.output(of.rows);
  return call;
}

}  // namespace

void pairwise_calls() {
  for (const tilewise::PairProgram& program : tilewise::kPairPrograms) {
    for (const Case& of : kCases) {
      Memory memory;
      const std::string loss(program.name);
      const PairCall pairs = pair_call(memory, of, loss.c_str());
      call(loss + " of " + std::to_string(of.rows) + " x " + std::to_string(of.columns), memory,
           [&] { return pairwise(pairs); });
    }
  }
}

}  // namespace race
