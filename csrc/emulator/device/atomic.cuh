// The host's twin of csrc/device/atomic.cuh.
#pragma once

#include "device/memory.cuh"

namespace fastattn {

namespace emulator {

template <class T>
FA_DEVICE T add_in_any_order(Global<T> to, T value, Where where) {
  take_turns();
  check_global(to.region, to.pointer, sizeof(T), Access::atomic, where);
  const T before = *to.pointer;
  *to.pointer = before + value;
  return before;
}

}  // namespace emulator

FA_DEVICE float atomic_add(Global<float> to, float value,
                           emulator::Where where = emulator::Where::here()) {
  return emulator::add_in_any_order(to, value, where);
}
FA_DEVICE int atomic_add(Global<int> to, int value,
                         emulator::Where where = emulator::Where::here()) {
  return emulator::add_in_any_order(to, value, where);
}

}  // namespace fastattn
