// The host's twin of csrc/device/ldmatrix.cuh.
#pragma once

#include "device/memory.cuh"

namespace fastattn {

template <class T>
FA_DEVICE void load_matrices(uint32_t (&registers)[4], Shared<T> row,
                             emulator::Where where = emulator::Where::here()) {
  static_assert(sizeof(T) == 2);
  emulator::read_matrices(registers, row.pointer, false, where);
}

template <class T>
FA_DEVICE void load_matrices_transposed(uint32_t (&registers)[4], Shared<T> row,
                                        emulator::Where where = emulator::Where::here()) {
  static_assert(sizeof(T) == 2);
  emulator::read_matrices(registers, row.pointer, true, where);
}

}  // namespace fastattn
