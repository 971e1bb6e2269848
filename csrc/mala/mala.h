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

#include "common/dtype.h"
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
struct MalaKernels {
  // Bidirectional, over tokens [begin, end); sums are added to.
  void (*sum_keys)(const MalaHead<T>&, int64_t begin, int64_t end);
  void (*queries)(const MalaHead<T>&, int64_t begin, int64_t end);
  void (*backward_queries)(const MalaHead<T>&, int64_t begin, int64_t end);  // grad_q; adds to grad_sums
  void (*backward_keys)(const MalaHead<T>&, int64_t begin, int64_t end);     // grad_k, grad_v
  // Causal, the whole sequence; sums end as those of all keys.
  void (*causal)(const MalaHead<T>&);
  void (*causal_backward)(const MalaHead<T>&);
};

TILEWISE_DECLARE_KERNELS(ForTypes<MalaKernels>, mala_kernels)

// A (batch, heads, tokens, width) tensor with unit columns.
struct TokenTensor {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t token = 0;
};

// All heads of a call on a GPU; a block takes a run of chunks of kMalaChunk tokens. Sums are float32: S, Z, U of every
// (sequence, key head), and causal of every run, then those of the keys before it; their gradients those of the queries
// after it.
constexpr int64_t kMalaChunk = 64;

struct MalaCall {
  Dtype dtype = Dtype::kFloat32;
  int64_t sequences = 0;
  int64_t heads = 0;
  int64_t key_heads = 0;
  int64_t queries = 0;  // of the longest sequence, or all that are packed
  int64_t keys = 0;
  int64_t features = 0;
  int64_t values = 0;
  float scale = 1;
  float eps = 0;
  bool causal = false;
  int64_t seen = 0;
  int64_t run = kMalaChunk;  // tokens
  TokenTensor q, k, v, out, grad_out, grad_q;
  const float* cos = nullptr;
  const float* sin = nullptr;
  const int64_t* q_bounds = nullptr;
  const int64_t* k_bounds = nullptr;
  MalaSums<float> sums;
  MalaSums<float> grad_sums;
  float* coefficients = nullptr;  // (3, batch, heads, queries): how a query enters dS, dZ and dU
  // (batch, heads or key heads, keys, ..): of every query head where a causal key head has several
  TokenTensor grad_k, grad_v;
  Dtype grad_dtype = Dtype::kFloat32;  // of grad_k and grad_v
};

// S is of more than one (kMalaChunk, kMalaChunk) tile.
TILEWISE_FN bool has_tiles(const MalaCall& call) { return call.features > kMalaChunk || call.values > kMalaChunk; }

// The sums over shares of `share` tokens: of the keys (c = 1), or of the queries with their coefficients.
struct MalaShares {
  int64_t share = 0;
  int64_t shares = 0;
  bool of_queries = false;
  MalaSums<float> parts;  // (sequences, heads, shares, ..)
};

// parts (lines, count, width) become the sums of the parts before each, or after each, plus start (lines, width); total
// (lines, width) is the sum of all and start. With total_only the parts stay as they are.
struct MalaScan {
  float* parts = nullptr;
  const float* start = nullptr;
  float* total = nullptr;
  int64_t lines = 0;
  int64_t count = 0;
  int64_t width = 0;
  bool back = false;
  bool total_only = false;
};

// out = the sum over `group` of (outer, group, inner) parts, rounded once.
struct MalaGroupSum {
  const float* parts = nullptr;
  void* out = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t outer = 0;
  int64_t group = 0;
  int64_t inner = 0;
};

// CUDA error strings, or null.
const char* mala_sums_cuda(const MalaCall& call, const MalaShares& shares, void* stream);
const char* mala_scan_cuda(const MalaScan& scan, void* stream);
const char* mala_forward_cuda(const MalaCall& call, void* stream);
const char* mala_query_gradient_cuda(const MalaCall& call, void* stream);
const char* mala_key_gradient_cuda(const MalaCall& call, void* stream);
const char* mala_group_sum_cuda(const MalaGroupSum& sum, void* stream);

}  // namespace tilewise
