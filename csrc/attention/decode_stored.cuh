// Caches of 8-bit numbers: value = stored * scale, with one scale for each key head.
//
// Every such number is one of T, float16 or bfloat16, so tiles are widened to T without an error and
// multiplied as ever; the keys' scale then acts on the scores, the values' on the output, both in
// float32. A new number is stored as x / scale, rounded to nearest even, and cut to the range.
#pragma once

#include <type_traits>

#include "attention/decode_cache.cuh"
#include "device/math.cuh"

namespace fastattn {

// float8_e4m3fn: a sign, 4 bits of exponent with bias 7, 3 bits of fraction; no infinity, and 0x7f
// is NaN (Micikevicius et al. 2022, arXiv:2209.05433).
struct e4m3_t {
  uint8_t bits;
};

// Of the heads of one cache, (batch or 1, kv_heads).
struct Scale {
  Global<const float> data;
  int64_t batch;  // stride
  FA_DEVICE float at(int sequence, int head) const { return load(data + (sequence * batch + head)); }
};

// Two bytes, each below 8 zeros, as two numbers of T.
template <class T, class Stored>
FA_DEVICE uint32_t widened(uint32_t bytes) {
  constexpr bool half = std::is_same_v<T, half_t>;
  const uint32_t magnitude = bytes & 0x007f007fu, sign = bytes & 0x00800080u;
  if constexpr (std::is_same_v<Stored, int8_t>) {
    // In T from 1024, or 128, on, the last place is 1: the difference is magnitude - 128 sign.
    constexpr uint32_t base = half ? 0x64006400u : 0x43004300u;
    return subtract_pairs<T>(magnitude | base, sign | base);
  } else {
    // The exponent's bias becomes that of T by the product with 2^8, or 2^120; subnormal numbers
    // fit as well. NaN gets the exponent of T's.
    constexpr int shift = half ? 7 : 4;
    constexpr uint32_t power = half ? 0x5c005c00u : 0x7b807b80u, exponent = half ? 0x80u : 0xf0u;
    const uint32_t nan = (magnitude + 0x00010001u) & 0x00800080u;
    return multiply_pairs<T>(magnitude << shift | nan * exponent | sign << 8, power);
  }
}

template <class Stored>
FA_DEVICE Stored narrowed(float x, float scale);
template <>
FA_DEVICE int8_t narrowed<int8_t>(float x, float scale) {
  const float scaled = x / scale;
  constexpr float whole = 12582912.0f;  // 1.5 2^23: no room for fractions
  const float rounded = (min(max(scaled, -128.0f), 127.0f) + whole) - whole;
  return static_cast<int8_t>(is_nan(scaled) ? 0.0f : rounded);
}
template <>
FA_DEVICE e4m3_t narrowed<e4m3_t>(float x, float scale) {
  const float scaled = x / scale, magnitude = min(abs(scaled), 448.0f);
  const uint32_t bits = float_bits(magnitude);
  // Below 2^-6 the last place is 2^-9, as it is of float32 from 2^14 on.
  uint32_t code = magnitude < 0x1p-6f ? float_bits(magnitude + 16384.0f) & 0x7f
                                      : ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120 << 3);
  if (is_nan(scaled)) code = 0x7f;
  return {static_cast<uint8_t>(code | (float_bits(scaled) >> 24 & 0x80))};
}

// x as a cache holds it, which is T as it is or 8 bits.
template <class Stored, class T>
FA_DEVICE Stored stored_as(T x, float scale) {
  if constexpr (std::is_same_v<Stored, T>) {
    return x;
  } else {
    return narrowed<Stored>(to_float(x), scale);
  }
}

}  // namespace fastattn
