// The host's twin of csrc/device/types.cuh.
#pragma once

#include "device/platform.cuh"
#include "emulator/numbers.h"

namespace fastattn {

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

FA_DEVICE float to_float(float x) { return x; }
FA_DEVICE float to_float(half_t x) { return emulator::half_to_float(x.bits); }
FA_DEVICE float to_float(bfloat16_t x) { return emulator::bfloat16_to_float(x.bits); }

template <class T>
FA_DEVICE T from_float(float x);
template <>
FA_DEVICE float from_float<float>(float x) { return x; }
template <>
FA_DEVICE half_t from_float<half_t>(float x) { return {emulator::float_to_half(x)}; }
template <>
FA_DEVICE bfloat16_t from_float<bfloat16_t>(float x) { return {emulator::float_to_bfloat16(x)}; }

template <class T>
FA_DEVICE uint32_t pack(float first, float second) {
  static_assert(sizeof(T) == 2);
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

template <class T>
FA_DEVICE void unpack(uint32_t pair, float& first, float& second) {
  static_assert(sizeof(T) == 2);
  first = to_float(T{static_cast<uint16_t>(pair & 0xffffu)});
  second = to_float(T{static_cast<uint16_t>(pair >> 16)});
}

template <class T>
FA_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  float x[2], y[2];
  unpack<T>(a, x[0], x[1]);
  unpack<T>(b, y[0], y[1]);
  return pack<T>(x[0] * y[0], x[1] * y[1]);
}
template <class T>
FA_DEVICE uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  float x[2], y[2];
  unpack<T>(a, x[0], x[1]);
  unpack<T>(b, y[0], y[1]);
  return pack<T>(x[0] - y[0], x[1] - y[1]);
}

FA_DEVICE uint32_t spread_bytes(uint32_t word, int half) {
  const uint32_t two = word >> (16 * half);
  return (two & 0xffu) | (two & 0xff00u) << 8;
}

}  // namespace fastattn
