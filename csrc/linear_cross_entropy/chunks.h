// How many lines of logits are formed at a time (host only).
#pragma once

#include <algorithm>
#include <cstdint>

namespace tilewise {

constexpr int64_t kMinRows = 64;
constexpr int64_t kMinClasses = 256;

// Of `count` lines of `line_bytes`, in parts of about equal size. chunk_bytes 0: 1/22 of them, within bounds below
// which products lose speed and above which they gain none.
inline int64_t logits_at_a_time(int64_t count, int64_t line_bytes, int64_t min_lines, int64_t chunk_bytes,
                                bool on_gpu) {
  if (count == 0) return 0;
  constexpr int64_t kShare = 22;
  const int64_t least = int64_t{on_gpu ? 128 : 16} << 20, most = int64_t{on_gpu ? 512 : 128} << 20;
  const int64_t line = std::max<int64_t>(1, line_bytes);
  const int64_t bytes = chunk_bytes == 0 ? std::clamp(count * line / kShare, least, most) : chunk_bytes;
  const int64_t lines = std::clamp(bytes / line, std::min(min_lines, count), count);
  const int64_t parts = (count + lines - 1) / lines;
  return (count + parts - 1) / parts;
}

}  // namespace tilewise
