// Scores of long rows, taken to where passes over them are short: those that matter, in shared memory (CUDA).
#pragma once

#include "simplex_topk/project.cuh"

namespace tilewise {

constexpr int kLongThreads = 512;
constexpr int kAtOnce = 16;  // loads of a thread that are under way

inline size_t long_bytes(int64_t size) {
  return kTeamBytes + static_cast<size_t>(size < kRoom ? size : kRoom) * sizeof(float);
}

__device__ __forceinline__ float* room_of(void* shared) { return static_cast<float*>(shared) + kTeamBytes / 4; }

// Calls wants(s, i) for the scores i of [begin, end), and take(place, s, i) for those that are wanted; places count
// from 0 in the order of i. Returns how many there are. The threads wait for each other before it ends.
template <typename Wants, typename Take>
__device__ __forceinline__ Count gather(const Team& team, const Scores& scores, int64_t begin, int64_t end,
                                        const Wants& wants, const Take& take) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Count taken = 0;
  for (int64_t base = begin; base < end; base += kAtOnce * team.size()) {
    const int64_t first = base + warp * (kAtOnce * kWarp) + lane;
    const int left = static_cast<int>(end - first < kAtOnce * kWarp ? end - first : kAtOnce * kWarp);
    float s[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) s[j] = j * kWarp < left ? scores(first + j * kWarp) : 0.0f;
    unsigned wanted[kAtOnce];
    Count of_warp = 0, of_all;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      wanted[j] = __ballot_sync(0xffffffffu, j * kWarp < left && wants(s[j], first + j * kWarp));
      of_warp += __popc(wanted[j]);
    }
    Count place = taken + team.warps_before(of_warp, of_all);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const unsigned before = wanted[j] & ((1u << lane) - 1u);
      if ((wanted[j] >> lane & 1u) != 0) take(place + __popc(before), s[j], first + j * kWarp);
      place += __popc(wanted[j]);
    }
    taken += of_all;
  }
  team.wait();
  return taken;
}

// What matters of a row, in `room` of kRoom if it has the room.
__device__ __forceinline__ InMemory staged(const Team& team, const Scores& scores, int64_t size, const Target& target,
                                           float* room) {
  if (size <= kRoom) {
    team.each(size, [&](int64_t i) { room[i] = scores(i); });
    return {team, {room, nullptr}, size};
  }
  const InMemory row{team, scores, size};
  if (target.k > kRoom) return row;
  const Range range = range_of(team, row);
  if (range.top != range.top) return row;
  Bracket bracket = bracket_of(team, row, range, lowest(target, range.top));
  narrow(team, row, target.k, kRoom, bracket);
  if (bracket.inside > kRoom) return row;  // most are equal
  const Count size_there = gather(
      team, scores, 0, size, [=](float s, int64_t) { return s > bracket.low; },
      [=](Count place, float s, int64_t) { room[place] = s; });
  return {team, {room, nullptr}, size_there};
}

}  // namespace tilewise
