// Losses over rows of logits: a row for each warp, and rows for blocks of two sizes.
#include <array>

#include "race.h"

namespace race {
namespace {

using tilewise::Dtype;

struct Shape {
  int64_t rows, columns;
};
constexpr std::array kShapes = {Shape{0, 33}, Shape{1, 1}, Shape{9, 33}, Shape{3, 5000}, Shape{2, 9000}};
constexpr std::array kDtypes = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

std::string named(const char* what, const Shape& shape, Dtype dtype, int64_t option) {
  return std::string(what) + " of " + std::to_string(shape.rows) + " x " + std::to_string(shape.columns) + ", dtype " +
         std::to_string(static_cast<int>(dtype)) + ", option " + std::to_string(option);
}

Call rows_call(Memory& memory, const Shape& shape, Dtype dtype) {
  const auto [rows, columns] = shape;
  Call call{.rows = rows, .columns = columns};
  const auto matrix = [&](void* data) {
    return Matrix{.data = data, .dtype = static_cast<int64_t>(dtype), .row_stride = columns, .column_stride = 1};
  };
  call.logits = matrix(memory.numbers(dtype, rows * columns));
  call.gradient = matrix(memory.output(dtype, rows * columns));
  call.target = memory.integers(rows, columns);
  call.ignore_index = -100;
  if (rows > 2) call.target[1] = call.ignore_index;
  call.reduction = 1;  // the mean
  call.scale = 1;
  call.loss_rows = memory.output(rows);
  call.share_rows = memory.output(rows);
  call.loss = memory.scratch(1);
  call.total = memory.output(1);
  call.grad_loss = memory.filled(1, 1.0f);
  return call;
}

// With everything that a call may have: statistics, smoothing, weights, and at last probabilities and a soft cap.
void give_details(Memory& memory, Call& call, int64_t option) {
  const int64_t rows = call.rows, columns = call.columns;
  call.details = 1;
  call.label_smoothing = 0.1;
  call.lse_square_scale = 1e-3;
  call.weight = memory.numbers(columns, 0.5f, 1.0f);
  call.row_weight = memory.numbers(rows, 0.5f, 1.0f);
  call.lse = memory.output(rows);
  call.entropy = memory.output(rows);
  call.argmax = memory.integer_output(rows);
  call.grad_lse = memory.numbers(rows);
  call.grad_entropy = memory.numbers(rows);
  call.grad_lse_stride = call.grad_entropy_stride = 1;
  if (option < 2) return;
  call.softcap = 5;
  call.target = nullptr;
  call.probabilities = {memory.shares(rows, columns), static_cast<int64_t>(Dtype::kFloat32), columns, 1};
}

// Blocks of long rows meet in memory.
void give_parts(Memory& memory, Call& call) {
  if (call.columns < 9000) return;
  call.parts = 3;
  call.part_memory = memory.scratch(call.rows * call.parts * tilewise::kPartBytes / 4);
}

}  // namespace

void cross_entropy_calls() {
  for (const Shape& shape : kShapes) {
    for (const Dtype dtype : kDtypes) {
      for (int64_t option = 0; option < 3; ++option) {
        Memory memory;
        Call of_rows = rows_call(memory, shape, dtype);
        of_rows.row_state = memory.output(3 * shape.rows);
        if (option > 0) give_details(memory, of_rows, option);
        give_parts(memory, of_rows);
        call(named("forward and backward", shape, dtype, option), memory, [&] {
          const char* error = cross_entropy_forward(of_rows);
          return error != nullptr ? error : cross_entropy_backward(of_rows);
        });
      }
    }
  }
}

void z_loss_calls() {
  for (const Shape& shape : kShapes) {
    for (const Dtype dtype : kDtypes) {
      for (int64_t kind = 0; kind < 3; ++kind) {
        Memory memory;
        Call of_rows = rows_call(memory, shape, dtype);
        of_rows.row_state = memory.output(4 * shape.rows);
        of_rows.kind = kind;
        of_rows.a = 1.5;
        of_rows.b = 0.25;
        of_rows.eps = 1e-3;
        give_parts(memory, of_rows);
        call(named("forward and backward", shape, dtype, kind), memory, [&] {
          const char* error = z_loss_forward(of_rows);
          return error != nullptr ? error : z_loss_backward(of_rows);
        });
      }
    }
  }
}

void accumulate_calls() {
  for (const int64_t count : {0, 1, 2500}) {
    Memory memory;
    const auto dtype = static_cast<int64_t>(Dtype::kBFloat16);
    const void* part = memory.numbers(Dtype::kBFloat16, count);
    float* sum = memory.output(count);
    void* out = memory.output(Dtype::kBFloat16, count);
    call("sum of " + std::to_string(count), memory, [&] {
      const char* error = accumulate(dtype, part, sum, out, count, 1, 0);
      return error != nullptr ? error : accumulate(dtype, part, sum, out, count, 0, 1);
    });
  }
}

}  // namespace race
