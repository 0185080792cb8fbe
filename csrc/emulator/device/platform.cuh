// The host's twin of csrc/device/platform.cuh: where the running fiber stands.
#pragma once

#include <cstdint>

#include "emulator/machine.h"

// The bound is written down as that many warps of nops before the function's code, where the launch
// reads it: no other mark of a function can depend on a template's arguments.
#define FA_KERNEL(threads, blocks) __attribute__((patchable_function_entry((threads) / 32)))
#define FA_PARAMS(type) const type
#define FA_DEVICE inline
#define FA_HOST_DEVICE inline
#define FA_UNROLL
#define FA_ROLL

namespace fastattn {

constexpr int warp_threads = 32;

FA_DEVICE int thread_index() { return emulator::position.thread; }
FA_DEVICE int block_threads() { return emulator::position.threads; }
FA_DEVICE int warp_index() { return thread_index() / warp_threads; }
FA_DEVICE int lane_index() { return thread_index() % warp_threads; }

FA_DEVICE int block_x() { return emulator::position.block[0]; }
FA_DEVICE int block_y() { return emulator::position.block[1]; }
FA_DEVICE int block_z() { return emulator::position.block[2]; }
FA_DEVICE int grid_x() { return emulator::position.grid[0]; }
FA_DEVICE int grid_y() { return emulator::position.grid[1]; }
FA_DEVICE int grid_z() { return emulator::position.grid[2]; }

}  // namespace fastattn
