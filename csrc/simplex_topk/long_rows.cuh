// Scores of long rows, a block for each: what matters of them is taken to shared memory, where passes over it are short
// (CUDA).
#pragma once

#include "simplex_topk/project.cuh"

namespace tilewise {

constexpr int kLongThreads = 256;
constexpr int64_t kStep = 8 * kLongThreads;  // scores that a block takes at a time
static_assert(kRoom % kStep == 0);

__host__ __device__ __forceinline__ int64_t whole_steps(int64_t size) { return (size + kStep - 1) / kStep * kStep; }

inline size_t long_bytes(int64_t size) {
  return kTeamBytes + static_cast<size_t>(size < kRoom ? whole_steps(size) : kRoom) * sizeof(float);
}

__device__ __forceinline__ float* room_of(void* shared) { return static_cast<float*>(shared) + kTeamBytes / 4; }

// Of whole steps.
struct InShared {
  static constexpr int kLevels = 4;
  const float* scores;
  int size;

  template <typename Function>
  __device__ __forceinline__ void pass(const Function& f) const {
    for (int first = threadIdx.x; first < size; first += kStep) {
#pragma unroll
      for (int j = 0; j < kStep; j += kLongThreads) f(scores[first + j]);
    }
  }
};

// take(i, load(i)) for i = first, first + kStride, .. < end; eight loads are under way.
template <int kStride, typename Load, typename Take>
__device__ __forceinline__ void each_loaded(int64_t first, int64_t end, const Load& load, const Take& take) {
  constexpr int kAtOnce = 8, kMost = kAtOnce * kStride;
  for (; first < end; first += kMost) {
    const int left = static_cast<int>(end - first < kMost ? end - first : kMost);
    float s[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) s[j] = j * kStride < left ? load(first + j * kStride) : 0.0f;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (j * kStride < left) take(first + j * kStride, s[j]);
    }
  }
}

template <typename Scores>
struct InMemory {
  static constexpr int kLevels = 4;
  Scores scores;
  int64_t size;

  template <typename Function>
  __device__ __forceinline__ void pass(const Function& f) const {
    each_loaded<kLongThreads>(threadIdx.x, size, scores, [&](int64_t, float s) { f(s); });
  }
};

// Calls wants(s, i) for the scores i of [begin, end), and take(place, s, i) for those that are wanted; places count
// from 0 in the order of i. Returns how many there are. Of a thread kAtOnce loads are under way.
template <int kAtOnce, typename Scores, typename Wants, typename Take>
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
  return taken;
}

// The first `count` numbers of the room as a source; all threads have written them.
__device__ __forceinline__ InShared filled(float* room, int64_t count) {
  const int size = static_cast<int>(whole_steps(count));
#pragma unroll 1
  for (int64_t i = count + threadIdx.x; i < size; i += kLongThreads) room[i] = -infinity<float>();
  __syncthreads();
  return {room, size};
}

// Takes what matters of a row to the room: how many, or 0 if that is too much.
template <typename Scores>
__device__ __forceinline__ Count take_in(const Team& team, const Scores& scores, int64_t size, const Target& target,
                                         float* room) {
  if (size <= kRoom) {
    each_loaded<kLongThreads>(threadIdx.x, size, scores, [=](int64_t i, float s) { room[i] = s; });
    return static_cast<Count>(size);
  }
  if (target.k > kRoom) return 0;
  const InMemory<Scores> row{scores, size};
  const Range range = range_of(team, row);
  if (range.top != range.top) return 0;
  Bracket bracket = bracket_of(team, row, range, lowest(target, range.top));
  narrow(team, row, target.k, kRoom, bracket);
  if (bracket.inside > kRoom) return 0;  // most are equal
  return gather<8>(
      team, scores, 0, size, [=](float s, int64_t) { return s > bracket.low; },
      [=](Count place, float s, int64_t) { room[place] = s; });
}

// use(source, cut) of a row of which the room has `count` scores, or none.
template <typename Scores, typename Use>
__device__ __forceinline__ void with_cut(const Team& team, const Scores& scores, int64_t size, const Target& target,
                                         float* room, Count count, const Use& use) {
  if (count > 0) {
    const InShared source = filled(room, count);
    use(source, find_cut(team, source, target, scores, size));
  } else {
    const InMemory<Scores> source{scores, size};
    use(source, find_cut(team, source, target, scores, size));
  }
}

}  // namespace tilewise
