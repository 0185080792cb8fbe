// Barriers of a block (PTX ISA, "bar.sync", "bar.arrive").
#pragma once

#include "device/platform.cuh"

namespace fastattn {

// All threads of the block.
FA_DEVICE void sync_block() { __syncthreads(); }

// `threads` threads, whole warps, meet at one of the barriers 1 to 15; those that only arrive go on
// at once.
FA_DEVICE void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}
FA_DEVICE void arrive_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

}  // namespace fastattn
