// Functions of one number, of the accuracy that kernels rely on.
#pragma once

#include <cmath>

#include "device/types.cuh"

namespace fastattn {

constexpr float infinity = __builtin_huge_valf();
constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

// 2^x to 2 units in the last place, subnormal results as zero (PTX ISA, "ex2.approx.ftz.f32").
FA_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2 x, absolute error 2^-22 near 1, subnormal x as zero (PTX ISA, "lg2.approx.ftz.f32").
FA_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 unit in the last place, subnormal x and results as zero (PTX ISA,
// "rcp.approx.ftz.f32").
FA_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / sqrt(x) to 2 units in the last place.
FA_DEVICE float rsqrt(float x) { return ::rsqrtf(x); }
FA_DEVICE float erf(float x) { return ::erff(x); }
FA_DEVICE float tanh(float x) { return ::tanhf(x); }
FA_DEVICE float exp(float x) { return ::expf(x); }
FA_DEVICE float abs(float x) { return ::fabsf(x); }
FA_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
// The larger and the smaller one; the other one if one is NaN.
FA_DEVICE float max(float a, float b) { return ::fmaxf(a, b); }
FA_DEVICE float min(float a, float b) { return ::fminf(a, b); }
FA_DEVICE bool is_nan(float x) { return x != x; }

// The upper 32 bits of a 64-bit product (PTX ISA, "mul.hi.u32").
FA_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
// The bits of a number, and back.
FA_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
FA_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

}  // namespace fastattn
