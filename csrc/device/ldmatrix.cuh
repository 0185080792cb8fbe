// Four 8x8 matrices of 16-bit elements from shared memory to a warp's registers (PTX ISA,
// "ldmatrix").
//
// Lane 8 m + r gives the place of row r of matrix m: 8 elements, 16 bytes, aligned to as many.
// registers[m] of lane l then holds row l / 4 of matrix m at the columns 2 (l % 4) and + 1; of the
// transposed matrix with `transposed`.
#pragma once

#include "device/memory.cuh"

namespace fastattn {

template <class T>
FA_DEVICE void load_matrices(uint32_t (&registers)[4], Shared<T> row) {
  static_assert(sizeof(T) == 2);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row.pointer));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

template <class T>
FA_DEVICE void load_matrices_transposed(uint32_t (&registers)[4], Shared<T> row) {
  static_assert(sizeof(T) == 2);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row.pointer));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

}  // namespace fastattn
