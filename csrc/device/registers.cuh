// Hints to the compiler on registers.
#pragma once

#include "device/platform.cuh"

namespace fastattn {

// The same number, of which the compiler knows nothing: what follows from it is computed where it
// is needed, instead of once before a loop for a register each.
FA_DEVICE int renewed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
FA_DEVICE int64_t renewed(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

}  // namespace fastattn
