// The 16-bit number types and their conversions, rounding to nearest even.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/platform.cuh"

namespace fastattn {

using half_t = __half;             // IEEE binary16
using bfloat16_t = __nv_bfloat16;  // 8 bits of exponent, 7 of fraction

FA_DEVICE float to_float(float x) { return x; }
FA_DEVICE float to_float(half_t x) { return __half2float(x); }
FA_DEVICE float to_float(bfloat16_t x) { return __bfloat162float(x); }

template <class T>
FA_DEVICE T from_float(float x);
template <>
FA_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FA_DEVICE half_t from_float<half_t>(float x) {
  return __float2half_rn(x);
}
template <>
FA_DEVICE bfloat16_t from_float<bfloat16_t>(float x) {
  return __float2bfloat16_rn(x);
}

// Two numbers in 32 bits, the first in the lower half: an operand of ldmatrix and mma.sync.
template <class T>
FA_DEVICE uint32_t pack(float first, float second);
template <>
FA_DEVICE uint32_t pack<half_t>(float first, float second) {
  __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<uint32_t*>(&pair);
}
template <>
FA_DEVICE uint32_t pack<bfloat16_t>(float first, float second) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<uint32_t*>(&pair);
}

// The products and the differences of two such pairs, each rounded to T.
template <class T>
FA_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b);
template <>
FA_DEVICE uint32_t multiply_pairs<half_t>(uint32_t a, uint32_t b) {
  __half2 pair = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<uint32_t*>(&pair);
}
template <>
FA_DEVICE uint32_t multiply_pairs<bfloat16_t>(uint32_t a, uint32_t b) {
  __nv_bfloat162 pair =
      __hmul2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<uint32_t*>(&pair);
}
template <class T>
FA_DEVICE uint32_t subtract_pairs(uint32_t a, uint32_t b);
template <>
FA_DEVICE uint32_t subtract_pairs<half_t>(uint32_t a, uint32_t b) {
  __half2 pair = __hsub2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<uint32_t*>(&pair);
}
template <>
FA_DEVICE uint32_t subtract_pairs<bfloat16_t>(uint32_t a, uint32_t b) {
  __nv_bfloat162 pair =
      __hsub2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<uint32_t*>(&pair);
}

// Bytes 2 half and 2 half + 1 of a word, each below 8 zeros.
FA_DEVICE uint32_t spread_bytes(uint32_t word, int half) {
  return __byte_perm(word, 0, half == 0 ? 0x4140 : 0x4342);
}

template <class T>
FA_DEVICE void unpack(uint32_t pair, float& first, float& second);
template <>
FA_DEVICE void unpack<half_t>(uint32_t pair, float& first, float& second) {
  float2 both = __half22float2(*reinterpret_cast<__half2*>(&pair));
  first = both.x;
  second = both.y;
}
template <>
FA_DEVICE void unpack<bfloat16_t>(uint32_t pair, float& first, float& second) {
  first = __uint_as_float(pair << 16);
  second = __uint_as_float(pair & 0xffff0000u);
}

}  // namespace fastattn
