// How the CPU kernels of a problem share its work between threads, and its memory in vectors (host only).
#pragma once

#include <cstdint>
#include <functional>

namespace tilewise {

// Calls f(begin, end) over [0, count), on one thread or on several.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>& f)>;

constexpr int64_t kPad = 16;  // a vector of any instruction set

inline int64_t padded(int64_t count) { return (count + kPad - 1) / kPad * kPad; }

}  // namespace tilewise
