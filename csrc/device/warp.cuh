// The 32 lanes of a warp to each other. All of them must arrive at the same call.
//
// PTX ISA, "shfl.sync", "vote.sync" and "bar.warp.sync", each with all lanes as members.
#pragma once

#include "device/types.cuh"

namespace fastattn {

constexpr uint32_t all_lanes = 0xffffffffu;

// The value that the lane with the number `lane_index() ^ mask` gave; that lane `source` gave.
// T has 32 bits.
template <class T>
FA_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(all_lanes, value, mask);
}
template <class T>
FA_DEVICE T shuffle(T value, int source) {
  return __shfl_sync(all_lanes, value, source);
}

// Bit l says what lane l gave.
FA_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(all_lanes, predicate); }

// Orders the memory accesses of the warp's lanes before it with those after it.
FA_DEVICE void sync_warp() { __syncwarp(); }

}  // namespace fastattn
