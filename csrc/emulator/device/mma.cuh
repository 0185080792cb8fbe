// The host's twin of csrc/device/mma.cuh.
#pragma once

#include <type_traits>

#include "device/types.cuh"

namespace fastattn {

template <class T>
FA_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                           emulator::Where where = emulator::Where::here()) {
  static_assert(std::is_same_v<T, half_t> || std::is_same_v<T, bfloat16_t>);
  emulator::multiply(d, a, b, std::is_same_v<T, bfloat16_t>, where);
}

}  // namespace fastattn
