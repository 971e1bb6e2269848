// Magnitude-aware linear attention (arXiv 2507.00698), one head. With phi(x) = elu(x) + 1, f = phi(q), g = phi(k) and
// an optional rotation R of the features after phi, a = R f, b = R g, over the n keys that a query sees:
//
//   S = sum b v^T (D, Dv)     Z = sum g (D)     U = sum v (Dv)
//   z = (scale/n) f . Z       y = (scale/n) S^T a
//   o = (1 + 1/(z + eps)) y - (z/n) U            (weights of a row sum to 1 without rotation)
//
// Bidirectional: a query sees all keys. Causal: query t sees the keys up to t, and those of an earlier state.
// Backward, with w = S do and zeta = dL/dz = -(y . do)/(z + eps)^2 - (do . U)/n:
//
//   dS = sum (scale/n) beta a do^T    dZ = sum (scale/n) zeta f    dU = -sum (z/n) do    beta = 1 + 1/(z + eps)
//   df = (scale/n) zeta Z + R^T (scale/n) beta w      dg = dZ + R^T dS v      dv = dS^T b + dU
//   dq = df min(f, 1)                                 dk = dg min(g, 1)
#pragma once

#include "common/isa.h"

namespace tilewise {

// A (tokens, width) matrix with unit columns; null where there is none.
template <typename T>
struct Tokens {
  T* data = nullptr;
  int64_t stride = 0;
};

// The sums over the keys of one head: S (D, Dv), Z (D), U (Dv), contiguous; also their gradients.
template <typename T>
struct MalaSums {
  T* s = nullptr;
  T* z = nullptr;
  T* u = nullptr;
};

// One head of one sequence. cos and sin (tokens, D/2) rotate the pairs (x_2i, x_2i+1).
template <typename T>
struct MalaHead {
  int64_t queries = 0;
  int64_t keys = 0;
  int64_t features = 0;  // D
  int64_t values = 0;    // Dv
  T scale = 1;
  T eps = 0;
  Tokens<const T> q, k, v, cos, sin;
  int64_t seen = 0;  // causal: keys in the sums before the first query
  MalaSums<T> sums;
  Tokens<T> out;
  // Backward
  Tokens<const T> grad_out;
  Tokens<T> grad_q, grad_k, grad_v;
  bool adds = false;  // grad_k and grad_v to what is there: another query head of the same keys came before
  MalaSums<T> grad_sums;
  T* per_query = nullptr;  // causal: (3, queries) beta, zeta, z for the sweep back
};

template <typename T>
struct MalaKernelsOf {
  // Bidirectional, over tokens [begin, end); sums are added to.
  void (*sum_keys)(const MalaHead<T>&, int64_t begin, int64_t end);
  void (*queries)(const MalaHead<T>&, int64_t begin, int64_t end);
  void (*backward_queries)(const MalaHead<T>&, int64_t begin, int64_t end);  // grad_q; adds to grad_sums
  void (*backward_keys)(const MalaHead<T>&, int64_t begin, int64_t end);     // grad_k, grad_v
  // Causal, the whole sequence; sums end as those of all keys.
  void (*causal)(const MalaHead<T>&);
  void (*causal_backward)(const MalaHead<T>&);
};

struct MalaKernels {
  MalaKernelsOf<float> on_float;
  MalaKernelsOf<double> on_double;
};
TILEWISE_DECLARE_KERNELS(MalaKernels, mala_kernels)

}  // namespace tilewise
