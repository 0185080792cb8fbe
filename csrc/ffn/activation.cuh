// The activations of ffn and their derivatives, in float32.
//
//   gelu_tanh   x s(z), z = 2 sqrt(2 / pi) (x + 0.044715 x^3), s the logistic function, as
//               (1 + tanh u) / 2 = s(2 u) (Hendrycks and Gimpel 2016, arXiv:1606.08415)
//   gelu        x P(X <= x) for a standard normal X (the same)
//   silu        x s(x)
//   relu        max(x, 0), NaN stays NaN
//
// (x s(z))' = s + x s (1 - s) z'.
#pragma once

#include "device/math.cuh"

namespace fastattn::ffn {

// As fastattn/ops/ffn/cuda.py numbers them.
enum class Activation : int { none = 0, gelu_tanh = 1, gelu = 2, relu = 3, silu = 4 };

struct Activated {
  float value, derivative;
};

struct Logistic {
  float s, rest;  // s and 1 - s, the latter without the cancellation of a subtraction near s = 1
};

FA_DEVICE Logistic logistic(float x) {
  constexpr float finite = 3e38f;  // times the s of where exp(-x) is infinite it is 0
  const float e = exp2_fast(x * -log2_e);
  const float s = reciprocal_fast(1.0f + e);
  return {s, min(e, finite) * s};
}

struct None {
  FA_DEVICE static Activated at(float x) { return {x, 1.0f}; }
};

struct GeluTanh {
  FA_DEVICE static Activated at(float x) {
    constexpr float linear = 1.5957691216057308f;  // 2 sqrt(2 / pi)
    constexpr float cubic = 0.07135481627260025f;  // 0.044715 linear
    // Beyond it s is 0 or 1 in float32; the cube is kept finite.
    constexpr float saturated = 16.0f;
    const float c = x > saturated ? saturated : x < -saturated ? -saturated : x;  // NaN stays NaN
    const auto [s, rest] = logistic(c * fma(c * c, cubic, linear));
    return {x * s, s + x * s * rest * fma(c * c, 3.0f * cubic, linear)};
  }
};

struct Gelu {
  FA_DEVICE static Activated at(float x) {
    constexpr float sqrt_half = 0.7071067811865476f;
    constexpr float one_over_sqrt_2_pi = 0.3989422804014327f;
    const float cdf = fma(0.5f, erf(x * sqrt_half), 0.5f);
    return {x * cdf, fma(x * exp2_fast(x * x * (-0.5f * log2_e)), one_over_sqrt_2_pi, cdf)};
  }
};

struct Relu {
  FA_DEVICE static Activated at(float x) {
    return {x <= 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
  }
};

struct Silu {
  FA_DEVICE static Activated at(float x) {
    const auto [s, rest] = logistic(x);
    return {x * s, s + x * s * rest};
  }
};

// body(the activation's struct). All threads of a warp give the same one.
template <class Body>
FA_DEVICE void with_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::none: return body(None{});
    case Activation::gelu_tanh: return body(GeluTanh{});
    case Activation::gelu: return body(Gelu{});
    case Activation::relu: return body(Relu{});
    case Activation::silu: return body(Silu{});
  }
}

}  // namespace fastattn::ffn
