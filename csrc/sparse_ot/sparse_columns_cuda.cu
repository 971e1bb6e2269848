// An evaluation of sparse_ot on CUDA: the cut of a column is found by a warp that holds it in registers, or by a block
// with what matters of it in shared memory; 8 warps sum the rows of a tile.
#include "simplex_topk/long_rows.cuh"
#include "sparse_ot/sparse_ot_launch.h"

namespace tilewise {
namespace {

constexpr int kWarps = 8;               // that sum rows, each of them every eighth column
constexpr int kOfLane = kPart / kWarp;  // rows of a part
constexpr int kGathered = 4;            // parts, by a warp
constexpr int kListThreads = 1024;      // of a long column
constexpr int64_t kMostY = 65535;       // blocks along y
constexpr int kSample = 4096;           // scores that a guess is from
constexpr int64_t kRuns = kSample / kWarp;
static_assert(kSample % kStep == 0 && kSample <= kRoom);

__device__ __forceinline__ Difference scores_of(const SparseColumns<float>& call, int64_t problem, int64_t column) {
  return {call.alpha + problem * call.alpha_stride, call.costs + (problem * call.columns + column) * call.rows};
}

__device__ __forceinline__ Cut cut_of(const SparseCut& cut) {
  const SparseCut::Levels levels = cut.levels;
  return {levels.level, levels.equal, levels.top, levels.below, cut.last, 0};
}

__device__ __forceinline__ Target target_of(const SparseColumns<float>& call, float level) {
  return {static_cast<Count>(call.k), call.gamma * level, call.dual, -level};
}

template <int kRowsOfLane>
TILEWISE_FN int64_t tiles_of(const SparseColumns<float>& call) {
  return (call.rows + kWarp * kRowsOfLane - 1) / (kWarp * kRowsOfLane);
}

// A level that more than k scores, but not many more, are above, as far as a sample of the column tells: runs of 32.
__global__ void __launch_bounds__(kLongThreads) sparse_guess_kernel(const __grid_constant__ SparseSearch search) {
  const SparseColumns<float>& call = search.call.columns;
  const int64_t at = flat_block(), problem = at / call.columns;
  if (problem >= call.batch) return;
  const Team team(dynamic_shared());
  const Difference scores = scores_of(call, problem, at % call.columns);
  float* room = room_of(dynamic_shared());
  const auto place = [&](int64_t i) { return call.rows * (i / kWarp) / kRuns + i % kWarp; };
  each_loaded<kLongThreads>(
      threadIdx.x, kSample, [&](int64_t i) { return scores(place(i)); }, [=](int64_t i, float s) { room[i] = s; });
  team.wait();
  const InShared sample{room, kSample};
  const int64_t twice = 2 * call.k, middle = (call.k + kRoom) / 2;
  const Count rank = static_cast<Count>((twice < middle ? twice : middle) * kSample / call.rows + 8);
  Bracket bracket = bracket_of(team, sample, range_of(team, sample), -infinity<float>());
  narrow(team, sample, rank, rank + rank / 4, bracket);
  if (team.first()) search.cuts[at].hint = bracket.low;
}

// Of the scores of a part, of which this lane has every 32nd: what is above the hint, or NaN, in order.
__device__ __forceinline__ void put_part(const SparseSearch& search, int64_t at, int64_t part,
                                         const float (&s)[kOfLane]) {
  const float hint = search.cuts[at].hint;
  const int64_t place = at * parts_of(search.call.columns) + part;
  float* gathered = search.gathered + place * kPart;
  const unsigned lane = threadIdx.x % kWarp;
  Count count = 0;
#pragma unroll
  for (int r = 0; r < kOfLane; ++r) {
    const bool wants = !(s[r] <= hint);
    const unsigned wanted = __ballot_sync(0xffffffffu, wants);
    float* to = gathered + (count + __popc(wanted & ((1u << lane) - 1u)));
    if (wants) *to = s[r];
    count += __popc(wanted);
  }
  if (lane == 0) search.counts[place] = count;
}

// Long as columns are, their number is one of 32 bits.
__global__ void __launch_bounds__(kLongThreads) sparse_gather_kernel(const __grid_constant__ SparseSearch search) {
  const SparseColumns<float>& call = search.call.columns;
  const int64_t at = blockIdx.x, problem = at / call.columns, parts = parts_of(call);
  if (ended(search, problem)) return;
  const Difference scores = scores_of(call, problem, at % call.columns);
  const int64_t warps = kLongThreads / kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 2
  for (int64_t part = blockIdx.y * warps + warp; part < parts; part += gridDim.y * warps) {
    const int64_t first = part * kPart + threadIdx.x % kWarp;
    float s[kOfLane];
#pragma unroll
    for (int r = 0; r < kOfLane; ++r)
      s[r] = first + r * kWarp < call.rows ? scores(first + r * kWarp) : -infinity<float>();
    put_part(search, at, part, s);
  }
}

// What the parts of a column have gathered, to `room` in order: how many, or 0 where that is not all that matters.
__device__ __forceinline__ Count joined(const Team& team, const SparseSearch& search, int64_t at, const Target& target,
                                        float* room) {
  if (search.gathered == nullptr) return 0;
  const int64_t parts = parts_of(search.call.columns);
  Count count = 0;
  for (int64_t base = 0; base < parts; base += kLongThreads) {
    const int64_t part = at * parts + base + threadIdx.x;
    const Count here = base + threadIdx.x < parts ? search.counts[part] : 0;
    Count of_all;
    const Count place = count + team.sum_before(here, of_all);
    if (place + here <= kRoom)
      each_loaded<1>(0, here, Row{search.gathered + part * kPart}, [=](int64_t i, float s) { room[place + i] = s; });
    count += of_all;
  }
  if (count == 0 || count > kRoom) return 0;
  if (count >= target.k) return count;
  const float top = range_of(team, filled(room, count)).top;
  return search.cuts[at].hint <= lowest(target, top) ? count : 0;
}

template <typename Team, typename Source>
__device__ __forceinline__ void put_cut(const Team& team, const Source& source, const SparseSearch& search, int64_t at,
                                        float level, const Cut& cut) {
  const SparseColumns<float>& call = search.call.columns;
  float squares = 0.0f, mass = 0.0f;
  const auto add = [&](float s, float times) {
    const float above = s - cut.top - cut.below;
    const float entry = above > 0.0f ? above / call.gamma : 0.0f;
    squares += times * entry * entry;
    mass += times * entry;
  };
  source.pass([&](float s) {
    if (s > cut.level) add(s, 1.0f);
  });
  squares = team.all_sum(squares);
  mass = team.all_sum(mass);
  add(cut.equal, static_cast<float>(cut.quota));  // not NaN
  team.wait();                                    // the level of all threads and beta may be the same number
  if (!team.first()) return;
  const float hint = cut.level - fmaxf(cut.top - cut.level, 0.0f) / 16.0f;
  search.cuts[at] = {{cut.level, cut.equal, cut.top, cut.below}, cut.last, squares, mass, hint};
  call.beta[at] = call.dual && cut.top == cut.top ? level : -(cut.top + cut.below);
}

template <int kCount>
__global__ void __launch_bounds__(256) sparse_cut_kernel(const __grid_constant__ SparseSearch search) {
  const SparseColumns<float>& call = search.call.columns;
  const int64_t at = flat_block() * blockDim.y + threadIdx.y;
  const int64_t problem = at / call.columns, column = at % call.columns;
  if (problem >= call.batch || ended(search, problem)) return;
  const float level = call.level[problem * call.level_stride + column];
  const Difference scores = scores_of(call, problem, column);
  const InRegisters<kCount> held(scores, call.rows);
  const Cut cut = find_cut(Warp(), held, target_of(call, level), scores, call.rows);
  put_cut(Warp(), held, search, at, level, cut);
}

__global__ void __launch_bounds__(kLongThreads) sparse_long_cut_kernel(const __grid_constant__ SparseSearch search) {
  const SparseColumns<float>& call = search.call.columns;
  const int64_t at = flat_block(), problem = at / call.columns, column = at % call.columns;
  if (problem >= call.batch || ended(search, problem)) return;
  const Team team(dynamic_shared());
  const float level = call.level[problem * call.level_stride + column];
  const Difference scores = scores_of(call, problem, column);
  const Target target = target_of(call, level);
  float* room = room_of(dynamic_shared());
  Count count = joined(team, search, at, target, room);
  if (count == 0) count = take_in(team, scores, call.rows, target, room);
  with_cut(team, scores, call.rows, target, room, count,
           [&](const auto& source, const Cut& cut) { put_cut(team, source, search, at, level, cut); });
}

// Of a tile, which is a part of every column, where row (y, x) has the potential `next`: what the next evaluation
// gathers.
__device__ __forceinline__ void gather_tile(const SparseSearch& search, int64_t problem, int64_t tile, float next,
                                            float* shared) {
  const SparseColumns<float>& call = search.call.columns;
  const int64_t first = tile * kPart + threadIdx.x;
  const float* costs = call.costs + problem * call.columns * call.rows + first;
  __syncthreads();  // all have read what is shared
  if (threadIdx.y < kOfLane) shared[threadIdx.y * kWarp + threadIdx.x] = next;
  __syncthreads();
#pragma unroll 2
  for (int64_t j = threadIdx.y; j < call.columns; j += kWarps) {
    float s[kOfLane];
#pragma unroll
    for (int r = 0; r < kOfLane; ++r) {
      const bool inside = first + r * kWarp < call.rows;
      s[r] = inside ? shared[r * kWarp + threadIdx.x] - costs[j * call.rows + r * kWarp] : -infinity<float>();
    }
    put_part(search, problem * call.columns + j, tile, s);
  }
}

// Lane x has rows x, x + kWarp, .. of a tile. With a step of Adam, where one is taken: only the block that sums a row
// reads its alpha; then for the next evaluation.
template <int kRowsOfLane>
__global__ void __launch_bounds__(kWarp* kWarps, 4) sparse_rows_kernel(const __grid_constant__ SparseSearch search) {
  const SparseColumns<float>& call = search.call.columns;
  const int64_t tiles = tiles_of<kRowsOfLane>(call), tile = flat_block() % tiles, problem = flat_block() / tiles;
  if (problem >= call.batch || ended(search, problem)) return;
  const int64_t first = tile * kWarp * kRowsOfLane + threadIdx.x;
  const float* costs = call.costs + problem * call.columns * call.rows + first;
  const SparseCut* cuts = search.cuts + problem * call.columns;
  float alpha[kRowsOfLane], sum[kRowsOfLane] = {};
#pragma unroll
  for (int r = 0; r < kRowsOfLane; ++r)
    alpha[r] = first + r * kWarp < call.rows ? call.alpha[problem * call.alpha_stride + first + r * kWarp] : 0.0f;
#pragma unroll 2
  for (int64_t j = threadIdx.y; j < call.columns; j += kWarps) {
    const Cut cut = cut_of(cuts[j]);
#pragma unroll
    for (int r = 0; r < kRowsOfLane; ++r) {
      const int64_t row = first + r * kWarp;
      if (row < call.rows) sum[r] += cut.mass(alpha[r] - costs[j * call.rows + r * kWarp], row);
    }
  }
  float* parts = static_cast<float*>(dynamic_shared());  // (kWarps, kRowsOfLane, kWarp)
#pragma unroll
  for (int r = 0; r < kRowsOfLane; ++r) parts[(threadIdx.y * kRowsOfLane + r) * kWarp + threadIdx.x] = sum[r];
  __syncthreads();
  const int64_t row = first + threadIdx.y * kWarp;
  float next = -infinity<float>();
  if (threadIdx.y < kRowsOfLane && row < call.rows) {
    float total = 0.0f;
#pragma unroll
    for (int part = 0; part < kWarps; ++part) total += parts[(part * kRowsOfLane + threadIdx.y) * kWarp + threadIdx.x];
    total /= call.gamma;
    call.row_sums[problem * call.row_stride + row] = total;
    if (search.first_left > 0.0f) {
      float* moments = search.vectors + problem * 2 * call.rows + row;
      const int64_t at = problem * call.rows + row;
      next = search.call.alpha[at] - adam_step(total - search.call.a[at], moments[0], moments[call.rows],
                                               search.first_left, search.second_left, search.call.rate);
      search.call.alpha[at] = next;
    }
  }
  if constexpr (kRowsOfLane == kOfLane) {
    if (search.gathered != nullptr && search.first_left > 0.0f) gather_tile(search, problem, tile, next, parts);
  }
}

// The entries of a column in the order of their rows, and its margin.
__global__ void __launch_bounds__(kListThreads) sparse_lists_kernel(const __grid_constant__ SparseSearch search) {
  const SparseColumns<float>& call = search.call.columns;
  const int64_t at = flat_block() * blockDim.y + threadIdx.y;
  const int64_t problem = at / call.columns;
  if (problem >= call.batch) return;
  const Team team(dynamic_shared());
  const Cut cut = cut_of(search.cuts[at]);
  float* values = call.values + at * call.k;
  int64_t* indices = call.indices + at * call.k;
  Count kept[] = {0};
  float last = infinity<float>(), following = -infinity<float>();
  const auto looks = [&](float s, int64_t i) {
    const bool keeps = cut.keeps(s, i);
    last = fminf(last, keeps ? s : infinity<float>());
    following = fmaxf(following, keeps ? -infinity<float>() : s);
    kept[0] += keeps;
    return cut.mass(s, i) / call.gamma > 0.0f;
  };
  const auto takes = [&](Count place, float s, int64_t i) {
    values[place] = cut.mass(s, i) / call.gamma;
    indices[place] = i;
  };
  const Count count = gather<8>(team, scores_of(call, problem, at % call.columns), 0, call.rows, looks, takes);
  for (int64_t i = count + team.rank(); i < call.k; i += team.size()) values[i] = 0.0f, indices[i] = 0;
  if (call.margin == nullptr) return;
  last = team.all(last, [](float a, float b) { return fminf(a, b); });
  following = team.all(following, [](float a, float b) { return fmaxf(a, b); });
  team.all_sums(kept);
  if (team.first())
    call.margin[at] = kept[0] == call.k && following > cut.top + cut.below ? last - following : infinity<float>();
}

const char* launch_columns(void (*kernel)(SparseSearch), const SparseSearch& search, dim3 block, size_t shared,
                           void* stream) {
  const SparseColumns<float>& call = search.call.columns;
  return launch(kernel, flat_grid(team_blocks(call.batch * call.columns, block)), block, shared, stream, search);
}

}  // namespace

const char* sparse_guess_cuda(const SparseSearch& search, void* stream) {
  return launch_columns(sparse_guess_kernel, search, dim3(kLongThreads), long_bytes(kSample), stream);
}

const char* sparse_gather_cuda(const SparseSearch& search, void* stream) {
  const SparseColumns<float>& call = search.call.columns;
  constexpr int64_t kOfBlock = kGathered * kLongThreads / kWarp;
  const int64_t columns = call.batch * call.columns, blocks = (parts_of(call) + kOfBlock - 1) / kOfBlock;
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(blocks < kMostY ? blocks : kMostY));
  return launch(sparse_gather_kernel, grid, dim3(kLongThreads), 0, stream, search);
}

const char* sparse_cut_cuda(const SparseSearch& search, void* stream) {
  const int64_t rows = search.call.columns.rows;
  if (rows > kMostInRegisters)
    return launch_columns(sparse_long_cut_kernel, search, dim3(kLongThreads), long_bytes(rows), stream);
  return with_registers(
      rows, [&](auto count) { return launch_columns(sparse_cut_kernel<count>, search, dim3(kWarp, 8), 0, stream); });
}

const char* sparse_rows_cuda(const SparseSearch& search, void* stream) {
  const SparseColumns<float>& call = search.call.columns;
  constexpr int64_t kMany = 32768;  // rows, which keep all multiprocessors busy by fours
  const auto launch_rows = [&](void (*kernel)(SparseSearch), int of_lane, int64_t tiles) {
    const size_t shared = kWarp * kWarps * of_lane * sizeof(float);
    return launch(kernel, flat_grid(call.batch * tiles), dim3(kWarp, kWarps), shared, stream, search);
  };
  return call.batch * call.rows < kMany && !is_gathered(call)
             ? launch_rows(sparse_rows_kernel<1>, 1, tiles_of<1>(call))
             : launch_rows(sparse_rows_kernel<kOfLane>, kOfLane, tiles_of<kOfLane>(call));
}

const char* sparse_lists_cuda(const SparseSearch& search, void* stream) {
  const bool is_long = search.call.columns.rows > kMostInRegisters;
  const dim3 block = is_long ? dim3(kListThreads) : dim3(kWarp, 8);
  return launch_columns(sparse_lists_kernel, search, block, kTeamBytes, stream);
}

}  // namespace tilewise
