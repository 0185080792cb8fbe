// The host's twin of csrc/device/cp_async.cuh: data arrives only at the wait that covers it.
#pragma once

#include "device/memory.cuh"

namespace fastattn {

template <class T>
FA_DEVICE void copy_async(Shared<T> to, Global<const T> from, bool valid = true,
                          emulator::Where where = emulator::Where::here()) {
  emulator::begin_copy(to.pointer, from.region, from.pointer, valid, where);
}

FA_DEVICE void commit_copies() { emulator::commit_copies(); }

template <int Pending>
FA_DEVICE void wait_copies() {
  emulator::wait_copies(Pending);
}

}  // namespace fastattn
