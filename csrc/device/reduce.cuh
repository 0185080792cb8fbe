// Sums and maxima over the lanes of a warp, over parts of it, and over the warps of a block.
//
// All are butterflies of a fixed shape, so that a result depends only on the values.
#pragma once

#include "device/barrier.cuh"
#include "device/memory.cuh"
#include "device/warp.cuh"

namespace fastattn {

// Over groups of Lanes neighbouring lanes; every lane gets its group's result.
template <int Lanes = warp_threads, class T>
FA_DEVICE T warp_sum(T value) {
  FA_UNROLL
  for (int mask = Lanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
template <int Lanes = warp_threads>
FA_DEVICE float warp_max(float value) {
  FA_UNROLL
  for (int mask = Lanes / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = value > other ? value : other;
  }
  return value;
}

// Over a block of Threads threads; every thread gets the result. `scratch` holds a float for each
// warp, and is free again after the next barrier of the block.
template <int Threads>
FA_DEVICE float block_sum(float value, Shared<float> scratch) {
  constexpr int warps = Threads / warp_threads;
  value = warp_sum(value);
  if constexpr (warps == 1) return value;
  if (lane_index() == 0) store(scratch + warp_index(), value);
  sync_block();
  float total = 0.0f;
  FA_UNROLL
  for (int warp = 0; warp < warps; ++warp) total += load(scratch + warp);
  return total;
}

}  // namespace fastattn
