// d += a b of a 16x16 and a 16x8 tile by the tensor core, accumulated in float32 (PTX ISA,
// "mma.sync.aligned.m16n8k16", matrix fragments of 16-bit types).
//
// With g = lane / 4 and c = 2 (lane % 4), a lane holds
//     d[0..1]: row g,     columns c, c + 1        a[0]: row g,     k = c, c + 1
//     d[2..3]: row g + 8, columns c, c + 1        a[1]: row g + 8, k = c, c + 1
//     b[0]: k = c, c + 1,     column g            a[2]: row g,     k = c + 8, c + 9
//     b[1]: k = c + 8, c + 9, column g            a[3]: row g + 8, k = c + 8, c + 9
#pragma once

#include "device/types.cuh"

namespace fastattn {

template <class T>
FA_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
FA_DEVICE void mma_16x8x16<half_t>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
FA_DEVICE void mma_16x8x16<bfloat16_t>(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace fastattn
