// The calls of `make race`, a group for each operator.
#pragma once

#include <string>

#include "calls.h"
#include "memory.h"

namespace race {

// Launches one call of a driver and takes note of its error, and of what is wrong with its memory. `what` names the
// call where a race is reported.
void begin(const std::string& what);
void end(const char* error, const Memory& memory);

template <typename Function>
void call(const std::string& what, const Memory& memory, Function launch) {
  begin(what);
  end(launch(), memory);
}

void cross_entropy_calls();
void z_loss_calls();
void accumulate_calls();
void pairwise_calls();
void clip_loss_calls();
void attention_calls();
void sinkhorn_calls();
void sinkhorn_apply_calls();
void sinkhorn_unrolled_calls();
void simplex_topk_calls();
void sparse_ot_calls();
void router_calls();
void wta_crs_calls();

}  // namespace race
