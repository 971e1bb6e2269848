#include "maths.h"

#include "common/online_softmax.h"

namespace tilewise::TILEWISE_ISA {
namespace {

template <typename From, typename To, typename Function>
void map(const From* x, To* y, int64_t n, Function function) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = function(x[i]);
}

void map_float(const char* function, const float* x, float* y, int64_t n) {
  if (std::strcmp(function, "exp") == 0) map(x, y, n, [](float v) { return fast_exp(v); });
  if (std::strcmp(function, "tanh") == 0) map(x, y, n, [](float v) { return fast_tanh(v); });
  if (std::strcmp(function, "sigmoid") == 0) map(x, y, n, [](float v) { return sigmoid(v); });
  if (std::strcmp(function, "softplus") == 0) map(x, y, n, [](float v) { return softplus(v); });
}

template <typename Storage>
void widen(const uint16_t* x, float* y, int64_t n) {
  map(x, y, n, [](uint16_t bits) { return to_float(Storage{bits}); });
}

template <typename Storage>
void narrow(const float* x, uint16_t* y, int64_t n) {
  map(x, y, n, [](float value) {
    Storage result;
    from_float(value, result);
    return result.bits;
  });
}

SoftmaxStats<float> tile_softmax(const float* x, const float* c, int64_t begin, int64_t end) {
  SoftmaxStats<float> stats;
  stats.argmax = begin;
  for (int64_t i = begin; i < end; ++i) {
    if (x[i] > stats.max) {
      stats.max = x[i];
      stats.argmax = i;
    }
  }
  for (int64_t i = begin; i < end; ++i) {
    stats.weight_sum += c[i];
    if (stats.max == -infinity<float>()) continue;
    const float d = x[i] - stats.max;
    const float p = fast_exp(d);
    if (i != stats.argmax) stats.sum += p;
    if (c[i] != 0) stats.weighted_dot += c[i] * d;
    if (p != 0) stats.exp_dot += p * d;
  }
  return stats;
}

Softmax softmax(const float* x, const float* c, const int64_t* tiles, const int64_t* order, int64_t n_tiles) {
  SoftmaxStats<float> total = tile_softmax(x, c, tiles[order[0]], tiles[order[0] + 1]);
  for (int64_t i = 1; i < n_tiles; ++i) merge(total, tile_softmax(x, c, tiles[order[i]], tiles[order[i] + 1]));
  return {total.max, total.sum, total.weight_sum, total.weighted_dot, total.exp_dot, total.argmax};
}

MomentStats<float> tile_moments(const float* x, int64_t begin, int64_t end) {
  MomentStats<float> stats;
  for (int64_t i = begin; i < end; ++i) merge(stats, MomentStats<float>{1.0f, x[i], 0.0f});
  return stats;
}

Moments moments(const float* x, const int64_t* tiles, const int64_t* order, int64_t n_tiles) {
  MomentStats<float> total;
  for (int64_t i = 0; i < n_tiles; ++i) merge(total, tile_moments(x, tiles[order[i]], tiles[order[i] + 1]));
  return {total.count, total.mean, total.m2, total.scale};
}

}  // namespace

extern const Maths maths = {map_float, widen<Float16>, widen<BFloat16>,       narrow<Float16>,       narrow<BFloat16>,
                            softmax,   moments,        multiply_units<float>, multiply_units<double>};

}  // namespace tilewise::TILEWISE_ISA
