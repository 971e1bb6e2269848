// exp, log, tanh and friends for row kernels: float through a polynomial that vectorises in a plain loop,
// double through the C library.
#pragma once

#include <type_traits>
#include <utility>

#include "common/dtype.h"

namespace tilewise {

inline constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// 2^x on the device's special function unit: relative error 2^-22, 0 below -126.
TILEWISE_FN float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return ::exp2f(x);
#endif
}

// log2 x on the same unit: absolute error 2^-22 in [0.5, 2], 2 units in the last place elsewhere; -inf where x is 0 or
// subnormal.
TILEWISE_FN float fast_log2(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return ::log2f(x);
#endif
}

// The low bits of a float as the exponent of another.
TILEWISE_FN float shifted_to_exponent(float x) { return bits_to_float(float_to_bits(x) << 23); }

#if !defined(__CUDACC__)

// GCC's and Clang's vectors of float or double: functions of V take them as well.
template <typename V>
concept IsVector = sizeof(V) > sizeof(double) && requires(V v) { v[0]; };
template <typename V>
using Element = std::remove_cvref_t<decltype(std::declval<V>()[0])>;

template <IsVector V>
TILEWISE_FN V shifted_to_exponent(V x) {
  return std::bit_cast<V>(std::bit_cast<decltype(x < x)>(x) << 23);
}

#endif

// exp(x) for x <= 88 within 2 units in the last place; 0 below -87, where results would be subnormal; NaN kept.
// Cody-Waite: x = n ln 2 + r with |r| <= ln 2 / 2, exp(x) = 2^n exp(r). Adding 1.5 2^23 + 127 rounds to the integer
// n + 127 in the low bits of the sum: shifted into the exponent they are 2^n. V is float, or a vector of floats.
// minus_1 is exp(x) - 1, without the cancellation near 0.
template <typename V>
TILEWISE_FN V exp_polynomial(V x, V& minus_1) {
  constexpr float kRound = 0x1.8p23f + 127.0f;
  const V clamped = x < -87.0f ? -87.0f : x;
  const V shifted = clamped * 1.44269504088896341f + kRound;
  const V n = shifted - kRound;
  const V high = clamped - n * 0.693359375f;
  const V r = high + n * 2.12194440e-4f;
  V p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r;
  const V e = x < -87.0f ? 0.0f : (p + 1.0f) * shifted_to_exponent(shifted);
  minus_1 = n == 0.0f ? p : e - 1.0f;
  return e;
}

TILEWISE_FN float fast_exp(float x) {
#if defined(__CUDA_ARCH__)
  return fast_exp2(x * 1.44269504088896341f);  // __expf spends three more instructions on subnormal results
#else
  float minus_1;
  return exp_polynomial(x, minus_1);
#endif
}
TILEWISE_FN double fast_exp(double x) { return ::exp(x); }

// e^x for x <= 0, and e^x - 1.
TILEWISE_FN float fast_exp(float x, float& minus_1) {
#if defined(__CUDA_ARCH__)
  const float e = fast_exp(x);
  float p = (1.0f / 720.0f) * x + 1.0f / 120.0f;
  p = p * x + 1.0f / 24.0f;
  p = p * x + 1.0f / 6.0f;
  p = p * x + 0.5f;
  minus_1 = x > -0.25f ? p * x * x + x : e - 1.0f;
  return e;
#else
  return exp_polynomial(x, minus_1);
#endif
}
TILEWISE_FN double fast_exp(double x, double& minus_1) {
  const double e = ::exp(x);
  minus_1 = x > -0.5 ? ::expm1(x) : e - 1.0;
  return e;
}

TILEWISE_FN float natural_log(float x) { return ::logf(x); }
TILEWISE_FN double natural_log(double x) { return ::log(x); }
TILEWISE_FN float natural_log1p(float x) { return ::log1pf(x); }
TILEWISE_FN double natural_log1p(double x) { return ::log1p(x); }

// The exponent below which exp is exactly 0 in the type: log-probabilities are clamped here before they
// multiply a probability, so that 0 * -inf is 0.
template <typename T>
struct ExpFloor;
template <>
struct ExpFloor<float> {
  static constexpr float value = -88.0f;
};
template <>
struct ExpFloor<double> {
  static constexpr double value = -746.0;
};

// x / y; on the device through the approximate reciprocal, which a loop over x computes once.
TILEWISE_FN float fast_divide(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fdividef(x, y);
#else
  return x / y;
#endif
}
TILEWISE_FN double fast_divide(double x, double y) { return x / y; }

// tanh to full relative precision near 0 (odd polynomial there, exp elsewhere), never overflowing.
TILEWISE_FN float fast_tanh(float x) {
#if defined(__CUDA_ARCH__)
  return ::tanhf(x);
#else
  const float a = ::fabsf(x);
  const float e = fast_exp(-2.0f * a);
  const float far = (1.0f - e) / (1.0f + e);
  const float s = x * x;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float near = a + a * s * p;
  const float magnitude = a < 0.625f ? near : far;
  return bits_to_float(float_to_bits(magnitude) | (float_to_bits(x) & 0x80000000u));
#endif
}
TILEWISE_FN double fast_tanh(double x) { return ::tanh(x); }

// log(1 + u) for u in [0, 1]: u times a polynomial of degree 8, which leaves 3e-8 of it.
template <typename V>
TILEWISE_FN V log1p_polynomial(V u) {
  V p = 5.2326880e-3f * u - 2.95052137e-2f;
  p = p * u + 7.82259107e-2f;
  p = p * u - 1.36632428e-1f;
  p = p * u + 1.91060051e-1f;
  p = p * u - 2.4842982e-1f;
  p = p * u + 3.33190978e-1f;
  p = p * u - 4.99994934e-1f;
  p = p * u + 9.9999994e-1f;
  return p * u;
}

#if !defined(__CUDACC__)

template <IsVector V>
TILEWISE_FN V fast_exp(V x) {
  if constexpr (sizeof(Element<V>) == sizeof(float)) {
    V minus_1;
    return exp_polynomial(x, minus_1);
  }
  for (size_t i = 0; i < sizeof(V) / sizeof(Element<V>); ++i) x[i] = fast_exp(x[i]);
  return x;
}

#endif

TILEWISE_FN float log1p_of_unit(float u) { return log1p_polynomial(u); }
TILEWISE_FN double log1p_of_unit(double u) { return ::log1p(u); }

#if !defined(__CUDACC__)

template <IsVector V>
TILEWISE_FN V log1p_of_unit(V u) {
  if constexpr (sizeof(Element<V>) == sizeof(float)) return log1p_polynomial(u);
  for (size_t i = 0; i < sizeof(V) / sizeof(Element<V>); ++i) u[i] = log1p_of_unit(u[i]);
  return u;
}

#endif

// a / b of b in [1, 2]; on the device by the reciprocal of the special function unit, within 2^-22.
template <typename V>
TILEWISE_FN V ratio(V a, V b) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<V, float>) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
    return a * inverse;
  }
#endif
  return a / b;
}

template <typename V>
TILEWISE_FN V sigmoid(V x) {
  const V e = fast_exp(x < 0.0f ? x : -x);
  return ratio<V>(x < 0.0f ? e : 1.0f, 1.0f + e);
}

// log(1 + exp(x)) without overflow
template <typename V>
TILEWISE_FN V softplus(V x) {
  return (x > 0.0f ? x : 0.0f) + log1p_of_unit(fast_exp(x > 0.0f ? -x : x));
}

}  // namespace tilewise
