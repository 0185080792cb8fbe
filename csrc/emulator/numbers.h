// 16-bit floating-point numbers as bits, rounded to nearest even as the GPU does: subnormal numbers
// are kept, what is too large becomes infinite, a NaN becomes 0x7fff.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastattn::emulator {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest < 0x400u) {  // a multiple of 2^-24
    return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));
  }
  return float_of(sign | ((rest << 13) + (112u << 23)));  // the exponent's bias: 15 becomes 127
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
  if (magnitude < 0x38800000u) {  // below 2^-14: the sum's last place is 2^-24, and it rounds
    const uint32_t sum = bits_of(float_of(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

inline float bfloat16_to_float(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace fastattn::emulator
