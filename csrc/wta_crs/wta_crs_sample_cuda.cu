// wta_crs on CUDA: the choice of rows (wta_crs_launch.h has the order). Weights are integers, so that their sums are
// the same whoever adds them.
#include "common/team.cuh"
#include "wta_crs/wta_crs_launch.h"

namespace tilewise {
namespace {

constexpr int kThreads = 256;
constexpr int kAloneThreads = 512;  // of a block that does all for a problem
constexpr int kManyThreads = 1024;  // of one that may read all of its weights
constexpr int64_t kWarps = kThreads / kWarp, kManyWarps = kManyThreads / kWarp;

// The rows of a part, in turns of a warp.
struct PartRows {
  __device__ __forceinline__ PartRows(const RowSample& call, int64_t part)
      : first(part * part_rows(call.rows)),
        last(first + part_rows(call.rows) < call.rows ? first + part_rows(call.rows) : call.rows) {}

  int64_t first, last;
};

__device__ __forceinline__ int64_t own_warp() { return threadIdx.x / kWarp; }

// Of rows [first, last).
__device__ __forceinline__ double largest_size(const Team& team, const RowSample& call, int64_t first, int64_t last) {
  double largest = 0.0;
#pragma unroll 4
  for (int64_t row = first + team.rank(); row < last; row += team.size()) largest = larger(largest, size_of(call, row));
  return team.all(largest, [](double a, double b) { return larger(a, b); });
}

__device__ __forceinline__ void weigh_part(const RowSample& call, double largest, int64_t number, RowPart* parts) {
  const PartRows rows(call, number);
  const Warp warp;
  RowPart part{0, 0, 0};
#pragma unroll 4
  for (int64_t row = rows.first + warp.rank(); row < rows.last; row += kWarp) {
    const int64_t units = units_of(size_of(call, row), largest, call.bits);
    const uint32_t own = own_weight(units, call.mix);
    call.own[row] = own;
    part.units += units;
    part.own += own;
    part.heaviest = own > part.heaviest ? own : part.heaviest;
  }
  part.units = warp.all_sum(part.units);
  part.own = warp.all_sum(part.own);
  part.heaviest = __reduce_max_sync(0xffffffffu, part.heaviest);
  if (warp.first()) parts[number] = part;
}

// How many rows of two parts are certain, and their weight: of parts `number` and `number` + `step`.
__device__ __forceinline__ void certain_of_two(const RowSample& call, const Shares& shares, int64_t number,
                                               int64_t step, uint32_t (&kept)[2], int64_t (&weight)[2]) {
  const int64_t turns = part_rows(call.rows), first = number * turns + threadIdx.x % kWarp;
#pragma unroll 1  // two loads of each of 32 warps are enough, and of 64 registers none is left
  for (int64_t turn = 0; turn < turns; turn += kWarp) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int64_t row = first + u * step * turns + turn;
      if (row >= call.rows) continue;
      const int64_t of_row = shares.of_all + call.own[row];
      const bool is_kept = keeps(shares, of_row);
      kept[u] += is_kept ? 1 : 0;
      weight[u] += is_kept ? of_row : 0;
    }
  }
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    kept[u] = __reduce_add_sync(0xffffffffu, kept[u]);
    weight[u] = Warp().all_sum(weight[u]);
  }
}

// Finds the certain rows and leaves their number and weight in every part. Each lane knows the heaviest row of a part:
// a warp looks at two parts at a time, and only where there may be certain rows.
__device__ __forceinline__ void keep_certain(const Team& team, const RowSample& call, const RowPart* parts,
                                             Shares& shares, Before* certain) {
  const int64_t warps = team.size() / kWarp, all = parts_of(call.rows);
  const int64_t of_lane = own_warp() + threadIdx.x % kWarp * warps;
  const int64_t heaviest = of_lane < all ? shares.of_all + parts[of_lane].heaviest : 0;
  while (shares.certain) {
    int64_t kept = 0, heavy = 0;
    const unsigned wanted = __ballot_sync(0xffffffffu, of_lane < all && keeps(shares, heaviest));
    for (int first = 0; first < kWarp; first += 2) {
      if ((wanted >> first & 3u) == 0) continue;
      uint32_t count[2] = {};
      int64_t weight[2] = {};
      certain_of_two(call, shares, own_warp() + first * warps, warps, count, weight);
      if (threadIdx.x % kWarp != 0) continue;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int64_t part = own_warp() + (first + u) * warps;
        if (part < all) certain[part] = {count[u], 0, weight[u]};
        kept += count[u];
        heavy += weight[u];
      }
    }
    kept = team.all_sum(kept);
    heavy = team.all_sum(heavy);
    if (kept == shares.kept) return;
    keep(shares, kept, heavy);
  }
}

// From the certain rows of each part what is before it. There are as many threads as parts, or more.
__device__ __forceinline__ void add_up(const Team& team, const RowSample& call, const RowPart* parts,
                                       const Shares& shares, int64_t start, Before* before) {
  static_assert(kMostParts <= kManyThreads);
  const int64_t part = team.rank();
  const bool inside = part < parts_of(call.rows);
  Before own{0, 0, 0};
  if (inside) {
    const PartRows rows(call, part);
    own = before[part];
    own.weight = (rows.last - rows.first) * shares.of_all + parts[part].own - own.weight;
  }
  int64_t total;
  const int64_t kept = team.sum_before(own.kept, total), weight = team.sum_before(own.weight, total);
  if (inside) before[part] = {kept, call.sums == nullptr ? points_before(shares, start, weight) : 0, weight};
}

__device__ __forceinline__ int64_t start_of(const RowSample& call, const Shares& shares, int64_t problem) {
  return random_below(shares.rest, *call.seed, problem * call.k);
}

// From the weights of all parts the shares, and what is before each part.
__device__ __forceinline__ Shares share_out(const Team& team, const RowSample& call, int64_t problem, double largest,
                                            const RowPart* parts, Before* before) {
  int64_t units = 0, own = 0;
  for (int64_t part = team.rank(); part < parts_of(call.rows); part += team.size()) {
    units += parts[part].units;
    own += parts[part].own;
    before[part] = {0, 0, 0};
  }
  units = team.all_sum(units);
  own = team.all_sum(own);
  Shares shares = none_certain(call, largest, units, own);
  keep_certain(team, call, parts, shares, before);
  add_up(team, call, parts, shares, start_of(call, shares, problem), before);
  return shares;
}

__device__ __forceinline__ void place_part(const RowSample& call, const Shares& shares, int64_t start, int64_t number,
                                           Before before) {
  const PartRows rows(call, number);
  const unsigned lane = threadIdx.x % kWarp;
  for (int64_t turn = rows.first; turn < rows.last; turn += kWarp) {
    const int64_t row = turn + lane;
    const bool inside = row < rows.last;
    const int64_t weight = inside ? shares.of_all + call.own[row] : 0;
    const bool is_kept = inside && keeps(shares, weight);
    const unsigned kept = __ballot_sync(0xffffffffu, is_kept);
    const int64_t sum = sum_up_to_lane(is_kept ? 0 : weight);
    Before own{before.kept + __popc(kept & ((1u << lane) - 1u)), 0, before.weight + sum - (is_kept ? 0 : weight)};
    if (call.sums == nullptr) own.points = points_before(shares, start, own.weight);
    if (inside) put_row(call, shares, start, row, own);
    before.kept += __popc(kept);
    before.weight += __shfl_sync(0xffffffffu, sum, kWarp - 1);
  }
}

__global__ void __launch_bounds__(kAloneThreads, 1) wta_crs_sample_kernel(const __grid_constant__ SampleWork work) {
  const Team team(dynamic_shared());
  const int64_t problem = flat_block(), parts = parts_of(work.call.rows);
  const RowSample call = problem_of(work.call, problem);
  RowPart* part_sums = work.parts + problem * parts;
  Before* before = work.before + problem * parts;
  const double largest = largest_size(team, call, 0, call.rows);
  for (int64_t part = own_warp(); part < parts; part += team.size() / kWarp) weigh_part(call, largest, part, part_sums);
  __syncthreads();
  const Shares shares = share_out(team, call, problem, largest, part_sums, before);
  __syncthreads();
  const int64_t start = start_of(call, shares, problem);
  for (int64_t part = own_warp(); part < parts; part += team.size() / kWarp)
    place_part(call, shares, start, part, before[part]);
  if (call.sums == nullptr) return;
  __syncthreads();
  for (int64_t i = team.rank(); i < shares.left; i += team.size()) put_draw(call, shares, problem * call.k, i);
}

TILEWISE_FN int64_t blocks_of(int64_t parts, int64_t warps) { return (parts + warps - 1) / warps; }

__global__ void __launch_bounds__(kThreads) wta_crs_sizes_kernel(const __grid_constant__ SampleWork work) {
  const Team team(dynamic_shared());
  const int64_t blocks = blocks_of(parts_of(work.call.rows), kWarps);
  const int64_t problem = flat_block() / blocks, block = flat_block() % blocks;
  if (problem >= work.call.batch) return;
  const RowSample call = problem_of(work.call, problem);
  const int64_t rows = kWarps * part_rows(call.rows), end = (block + 1) * rows;
  const double largest = largest_size(team, call, block * rows, end < call.rows ? end : call.rows);
  if (!team.first()) return;
  work.largest[flat_block()] = largest;
  if (block == 0) work.tickets[problem] = 0;
}

__global__ void __launch_bounds__(kManyThreads) wta_crs_weigh_kernel(const __grid_constant__ SampleWork work) {
  const Team team(dynamic_shared());
  const int64_t parts = parts_of(work.call.rows), blocks = blocks_of(parts, kManyWarps);
  const int64_t problem = flat_block() / blocks, part = flat_block() % blocks * kManyWarps + own_warp();
  if (problem >= work.call.batch) return;
  const RowSample call = problem_of(work.call, problem);
  const int64_t of_sizes = blocks_of(parts, kWarps);
  double largest = team.rank() < of_sizes ? work.largest[problem * of_sizes + team.rank()] : 0.0;
  largest = team.all(largest, [](double a, double b) { return larger(a, b); });
  RowPart* part_sums = work.parts + problem * parts;
  if (part < parts) weigh_part(call, largest, part, part_sums);
  if (!is_last_block(work.tickets + problem, blocks, static_cast<unsigned*>(dynamic_shared()))) return;
  __syncthreads();  // all have read what is shared
  const Shares shares = share_out(team, call, problem, largest, part_sums, work.before + problem * parts);
  if (team.first()) work.shares[problem] = shares;
}

__global__ void __launch_bounds__(kThreads) wta_crs_place_kernel(const __grid_constant__ SampleWork work) {
  const int64_t parts = parts_of(work.call.rows);
  const int64_t at = flat_block() * kWarps + own_warp(), problem = at / parts;
  if (problem >= work.call.batch) return;
  const RowSample call = problem_of(work.call, problem);
  const Shares shares = work.shares[problem];
  place_part(call, shares, start_of(call, shares, problem), at % parts, work.before[at]);
}

__global__ void __launch_bounds__(kThreads) wta_crs_draw_kernel(const __grid_constant__ SampleWork work) {
  const int64_t at = flat_block() * kThreads + threadIdx.x, problem = at / work.call.k, i = at % work.call.k;
  if (problem >= work.call.batch) return;
  const RowSample call = problem_of(work.call, problem);
  const Shares shares = work.shares[problem];
  if (i < shares.left) put_draw(call, shares, problem * call.k, i);
}

}  // namespace

const char* wta_crs_sample_cuda(const SampleWork& work, void* stream) {
  const dim3 block(work.call.rows <= 2048 ? kThreads : kAloneThreads);
  return launch(wta_crs_sample_kernel, flat_grid(work.call.batch), block, kTeamBytes, stream, work);
}

const char* wta_crs_sizes_cuda(const SampleWork& work, void* stream) {
  const int64_t blocks = work.call.batch * blocks_of(parts_of(work.call.rows), kWarps);
  return launch(wta_crs_sizes_kernel, flat_grid(blocks), dim3(kThreads), kTeamBytes, stream, work);
}

const char* wta_crs_weigh_cuda(const SampleWork& work, void* stream) {
  const int64_t blocks = work.call.batch * blocks_of(parts_of(work.call.rows), kManyWarps);
  return launch(wta_crs_weigh_kernel, flat_grid(blocks), dim3(kManyThreads), kTeamBytes, stream, work);
}

const char* wta_crs_place_cuda(const SampleWork& work, void* stream) {
  const int64_t blocks = blocks_of(work.call.batch * parts_of(work.call.rows), kWarps);
  return launch(wta_crs_place_kernel, flat_grid(blocks), dim3(kThreads), 0, stream, work);
}

const char* wta_crs_draw_cuda(const SampleWork& work, void* stream) {
  const int64_t blocks = (work.call.batch * work.call.k + kThreads - 1) / kThreads;
  return launch(wta_crs_draw_kernel, flat_grid(blocks), dim3(kThreads), 0, stream, work);
}

}  // namespace tilewise
