// How many lines of logits are formed at a time (host only).
#pragma once

#include <algorithm>
#include <cstdint>

namespace tilewise {

constexpr int64_t kMinRows = 64;
constexpr int64_t kMinClasses = 256;
constexpr int64_t kTileLines = 256;  // of a product's tile on a GPU: the rest of one is work, too

constexpr int64_t whole_tiles(int64_t lines) { return (lines + kTileLines - 1) / kTileLines * kTileLines; }

// Of `count` lines of `line_bytes`, in parts of about equal size. chunk_bytes 0: 1/22 of them, within bounds below
// which products lose speed and above which they gain none; on a GPU whole tiles, within the upper bound.
inline int64_t logits_at_a_time(int64_t count, int64_t line_bytes, int64_t min_lines, int64_t chunk_bytes,
                                bool on_gpu) {
  if (count == 0) return 0;
  constexpr int64_t kShare = 22;
  const int64_t least = int64_t{on_gpu ? 128 : 16} << 20, most = int64_t{on_gpu ? 512 : 128} << 20;
  const int64_t line = std::max<int64_t>(1, line_bytes);
  const int64_t bytes = chunk_bytes == 0 ? std::clamp(count * line / kShare, least, most) : chunk_bytes;
  const int64_t held = std::clamp(bytes / line, std::min(min_lines, count), count);
  const bool by_tiles = on_gpu && chunk_bytes == 0 && most / line >= kTileLines;
  const int64_t lines = by_tiles ? std::min(whole_tiles(held), most / line / kTileLines * kTileLines) : held;
  const int64_t parts = (count + lines - 1) / lines, each = (count + parts - 1) / parts;
  return by_tiles ? std::min(whole_tiles(each), count) : each;
}

}  // namespace tilewise
