// What the programs of the pairwise engine are made of. A program is a loss, or a share of one, over one row of
// similarities: a struct with its name, the number of its parameters, and run<T>(row, parameters...). z = scale s +
// bias; P and N are the row's positive and negative pairs, #P and #N their numbers. A Row offers
//
//   fold<Op...>(f)    for every pair f(z, relation) gives one value per Op (Sum, Max, Min): their totals, of one Op a T
//   first(f)          the lowest column with f(z, relation), or -1
//   finish(loss)      the loss of an active row;  skip() one without the pairs that the loss needs: 0, no gradient
//   wants_gradient()
//   write(f)          dL/dz of every pair: f(z, relation)
//   write_and_sum(f)  the same of f that gives another value beside it: their total
//   write_two(...)    of two pairs, given by column (-1: none) and value; 0 of all others
//
// with relation 1 for positives, -1 for negatives, 0 for what is neither, which adds nothing to a fold. On a CPU z and
// relation are vectors.
#pragma once

#include "pairwise/pairwise.h"

// A program runs where its Row does: on a GPU with all threads of the row.
#if defined(__CUDACC__)
#define TILEWISE_PROGRAM static __device__ __forceinline__
#else
#define TILEWISE_PROGRAM static inline
#endif

namespace tilewise {

struct PairProgram {
  const char* name;
  int parameters;
};

template <typename... Programs>
struct ProgramList {};

struct Sum {};
struct Max {};
struct Min {};

template <typename T, int kCount>
struct Values {
  T value[kCount];
};

template <typename T, typename... More>
TILEWISE_FN Values<T, 1 + sizeof...(More)> values(T first, More... more) {
  return {first, more...};
}

// The hardest pairs: min_P z, inf without positives, and max_N z, -inf without negatives.
template <typename T>
struct Extremes {
  T least, most;
};

template <typename T, typename Row>
TILEWISE_PROGRAM Extremes<T> extremes(Row& row) {
  const Values<T, 2> ends = row.template fold<Min, Max>([](auto z, auto relation) {
    return values(relation > 0 ? z : infinity<T>(), relation < 0 ? z : -infinity<T>());
  });
  return {ends.value[0], ends.value[1]};
}

}  // namespace tilewise
