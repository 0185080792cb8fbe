// The host's twin of csrc/device/barrier.cuh.
#pragma once

#include "device/platform.cuh"

namespace fastattn {

FA_DEVICE void sync_block(emulator::Where where = emulator::Where::here()) {
  emulator::sync_all(where);
}

FA_DEVICE void sync_named(int barrier, int threads,
                          emulator::Where where = emulator::Where::here()) {
  emulator::sync_barrier(barrier, threads, where);
}
FA_DEVICE void arrive_named(int barrier, int threads,
                            emulator::Where where = emulator::Where::here()) {
  emulator::arrive_barrier(barrier, threads, where);
}

}  // namespace fastattn
