// How the CPU kernels of a problem share its work between threads, and its memory in vectors (host only).
#pragma once

#include <cstdint>
#include <functional>

namespace tilewise {

class Parallel {
 public:
  // Calls f(begin, end) over parts of [0, count), on one thread or on several; not over all of them once interrupted.
  virtual void operator()(int64_t count, const std::function<void(int64_t begin, int64_t end)>& f) const = 0;
  // Whether the call was interrupted and its result is of no use (interrupt.h).
  virtual bool interrupted() const = 0;

 protected:
  ~Parallel() = default;
};

constexpr int64_t kPad = 16;  // a vector of any instruction set

inline int64_t padded(int64_t count) { return (count + kPad - 1) / kPad * kPad; }

}  // namespace tilewise
