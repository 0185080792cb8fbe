// The host's twin of csrc/device/warp.cuh.
#pragma once

#include <cstring>

#include "device/types.cuh"

namespace fastattn {

constexpr uint32_t all_lanes = 0xffffffffu;

template <class T>
FA_DEVICE T shuffle(T value, int source, emulator::Where where = emulator::Where::here()) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulator::exchange(bits, source % warp_threads, where);
  std::memcpy(&value, &bits, 4);
  return value;
}
template <class T>
FA_DEVICE T shuffle_xor(T value, int mask, emulator::Where where = emulator::Where::here()) {
  return shuffle(value, lane_index() ^ mask, where);
}

FA_DEVICE uint32_t ballot(bool predicate, emulator::Where where = emulator::Where::here()) {
  return emulator::vote(predicate, where);
}

FA_DEVICE void sync_warp(emulator::Where where = emulator::Where::here()) {
  emulator::sync_lanes(where);
}

}  // namespace fastattn
