// Batches of transport problems: types, shapes, values and threads of what is given to them (host only).
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "common/checks.h"
#include "transport/interrupt.h"
#include "transport/parallel.h"

namespace tilewise {

inline ScalarType computed(const Tensor& tensor, const char* op, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  require(dtype == ScalarType::Float || (!kOnGpu && dtype == ScalarType::Double), op, "expected ", name, " to be ",
          kOnGpu ? "float32 on a GPU" : "float32 or float64", ", got ", toString(dtype));
  return dtype;
}

// A number of a call in the type that is computed in, where it must neither become 0 nor infinite.
template <typename T>
T positive(double number, const char* op, const char* name) {
  using Limits = std::numeric_limits<T>;
  require(number >= Limits::min() && number <= Limits::max(), op, "expected ", name,
          " to be a finite number above 0, a normal one in ", sizeof(T) == 4 ? "float32" : "float64", ", got ", number);
  return static_cast<T>(number);
}

// What the tensors of a call have to agree with.
struct Shape {
  const Tensor& first;
  const char* op;
  int64_t batch, rows, columns;

  template <typename T>
  const T* dense(const Tensor& tensor, std::vector<int64_t> shape, const char* name) const {
    return tilewise::dense<T>(tensor, std::move(shape), first.scalar_type(), op, name);
  }
  template <typename T>
  const T* dense(const std::optional<Tensor>& tensor, std::vector<int64_t> shape, const char* name) const {
    return tilewise::dense<T>(tensor, std::move(shape), first.scalar_type(), op, name);
  }
};

#if defined(TILEWISE_CUDA)

// Calls f with the launches of a call that needs as many bytes between them.
template <typename Launches, typename Function>
void launch_with(const Shape& shape, int64_t bytes, const Function& f) {
  const Tensor scratch = torch::stable::new_empty(shape.first, {bytes}, ScalarType::Byte);
  Launches launches(scratch.data_ptr(), current_stream(shape.first));
  require_launched(f(launches), shape.op);
}

#else

// Values are checked on a CPU alone: on a GPU that would synchronise.
template <typename Value>
void check_all(const char* op, int64_t count, const Value& value, const char* name, const char* what) {
  std::atomic<bool> fine{true};
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!value(i)) fine.store(false, std::memory_order_relaxed);
    }
  });
  require(fine.load(), op, "expected ", name, " to hold ", what, ", got NaN or another");
}

template <typename T>
struct Marginal {
  const T* values;
  int64_t size;
};

template <typename T>
void check_marginals(const char* op, int64_t batch, Marginal<T> a, Marginal<T> b, bool equal_sums,
                     const char* where = "") {
  const auto sum_of = [&](const Marginal<T>& marginal, int64_t index, const char* name) {
    double sum = 0.0;
    for (int64_t i = 0; i < marginal.size; ++i) {
      const T value = marginal.values[index * marginal.size + i];
      require(value >= 0 && std::isfinite(value), op, "expected ", name, " to hold finite numbers >= 0, got ", value);
      sum += static_cast<double>(value);
    }
    return sum;
  };
  for (int64_t index = 0; index < batch; ++index) {
    const double of_a = sum_of(a, index, "a"), of_b = sum_of(b, index, "b");
    require(!equal_sums || std::fabs(of_a - of_b) <= 1e-4 * std::max(of_a, of_b), op,
            "expected a and b to have equal sums", where, ", got ", of_a, " and ", of_b);
  }
}

class Threads final : public Parallel {
 public:
  explicit Threads(Interrupt& interrupt, bool alone = false) : interrupt_(interrupt), alone_(alone) {}

  void operator()(int64_t count, const std::function<void(int64_t, int64_t)>& f) const override {
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end && !interrupt_(); ++i) f(i, i + 1);
    };
    alone_ ? some(0, count) : torch::stable::parallel_for(0, count, 1, some);
  }
  bool interrupted() const override { return interrupt_(); }

 private:
  Interrupt& interrupt_;
  bool alone_;
};

// One problem after the other on all threads, or as many beside each other as there are threads.
template <typename T, typename Solve>
void each_problem(const Tensor& like, int64_t batch, int64_t elements, const Solve& solve) {
  Interrupt interrupt;
  const Threads all(interrupt), alone(interrupt, true);
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t workers = batch >= threads ? std::min(batch, threads) : 1;
  const int64_t each = padded(elements);
  const Tensor scratch = new_output(like, {workers * each + kPad}, like.scalar_type());
  T* memory = static_cast<T*>(scratch.data_ptr());
  if (workers == 1) {
    for (int64_t index = 0; index < batch && !interrupt(); ++index) solve(index, memory, all);
    return;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      const int64_t last = batch * (worker + 1) / workers;
      for (int64_t index = batch * worker / workers; index < last && !interrupt(); ++index)
        solve(index, memory + worker * each, alone);
    }
  });
}

#endif

}  // namespace tilewise
