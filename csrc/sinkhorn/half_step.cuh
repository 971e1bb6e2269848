// What half an iteration on CUDA is but for its pairs: whether it counts, and what becomes of the sums of its rows.
#pragma once

#include "common/team.cuh"
#include "sinkhorn/sinkhorn_launch.h"

namespace tilewise {

// Of the iteration, or of the pass after the last.
__device__ __forceinline__ Stage<float> stage_of(const SinkhornDecision& decision, int64_t problem) {
  const float epsilon = decision.epsilon[problem];
  if (decision.stages == nullptr || decision.t == decision.max_iter) return {epsilon};
  return decision.stages[problem];
}

__device__ __forceinline__ float total_error(const SinkhornDecision& decision, int64_t problem, float* shared) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < decision.tiles; i += blockDim.x)
    sum += decision.partials[problem * decision.tiles + i];
  sum = Team(shared).all_sum(sum);
  return decision.mass[problem] > 0.0f ? sum / decision.mass[problem] : 0.0f;
}

// Whether iteration t counts, the same in every block of a problem; the first says so, and what follows.
__device__ __forceinline__ bool goes_on(const SinkhornDecision& decision, int64_t problem, bool first, float* shared) {
  const float error = total_error(decision, problem, shared);
  const Schedule<float> schedule{decision.epsilon[problem],  decision.tol,      decision.scaling, decision.max_iter,
                                 decision.stages != nullptr, decision.symmetric};
  const Stage<float> stage = stage_of(decision, problem);
  const bool on = !schedule.stops(stage, error, decision.t);
  if (first && threadIdx.x == 0) {
    decision.error[problem] = error;
    if (on) write_relaxed(decision.n_iter + problem, decision.t + 1);
    if (schedule.falls) decision.following[problem] = schedule.next(stage, error, decision.t);
  }
  return on;
}

// The new potential of row i from its largest score and the sum of exp(score - top); its error, where it is asked for.
__device__ __forceinline__ float finish_row(const SinkhornHalfStep& step, const Stage<float>& stage, int64_t problem,
                                            int64_t i, float top, float total) {
  const int64_t at = problem * step.pairs.rows + i;
  const float now = stage.epsilon, inverse = 1.0f / now;
  const bool dead = total == 0.0f;
  float lse = dead ? -infinity<float>() : top + ::logf(total), error = 0.0f;
  if (step.x_squares != nullptr) lse -= step.x_squares[at] * inverse;
  float after = dead ? 0.0f : -now * damping(step.rho, now) * lse;
  const float how_far = step.symmetric ? 0.5f : stage.step;
  const float was = how_far != 1.0f || step.own != nullptr ? step.before[at] : 0.0f;
  if (step.own != nullptr) {
    const float a = step.own[at], ratio = target_ratio(was * inverse, now, step.rho);
    if (a > 0.0f) error = a * fabsf(::expf(was * inverse + lse) - ratio);
  }
  if (how_far != 1.0f) after = was + how_far * (after - was);
  step.after[at] = after;
  return error;
}

}  // namespace tilewise
