// The host's twin of csrc/device/math.cuh.
#pragma once

#include <cmath>

#include "device/types.cuh"
#include "emulator/counts.h"

namespace fastattn {

constexpr float infinity = __builtin_huge_valf();
constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

FA_DEVICE float exp2_fast(float x) {
  ++emulator::counts->exp2;
  if (x < -126.0f) return 0.0f;  // the result is subnormal
  return ::exp2f(x);
}

FA_DEVICE float log2_fast(float x) {
  if (::fabsf(x) < 0x1p-126f) return -infinity;
  return ::log2f(x);
}

FA_DEVICE float reciprocal_fast(float x) {
  const float y = 1.0f / (::fabsf(x) < 0x1p-126f ? ::copysignf(0.0f, x) : x);
  return ::fabsf(y) < 0x1p-126f ? ::copysignf(0.0f, y) : y;
}

FA_DEVICE float rsqrt(float x) { return 1.0f / ::sqrtf(x); }
FA_DEVICE float erf(float x) { return ::erff(x); }
FA_DEVICE float tanh(float x) { return ::tanhf(x); }
FA_DEVICE float exp(float x) { return ::expf(x); }
FA_DEVICE float abs(float x) { return ::fabsf(x); }
FA_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FA_DEVICE float max(float a, float b) { return ::fmaxf(a, b); }
FA_DEVICE float min(float a, float b) { return ::fminf(a, b); }
FA_DEVICE bool is_nan(float x) { return x != x; }

FA_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
FA_DEVICE uint32_t float_bits(float x) { return emulator::bits_of(x); }
FA_DEVICE float bits_float(uint32_t x) { return emulator::float_of(x); }

}  // namespace fastattn
