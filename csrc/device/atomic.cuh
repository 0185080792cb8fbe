// Read-modify-write of global memory, in one step (PTX ISA, "atom.global.add"). The order of float
// sums is not defined: no kernel whose result is promised to be reproducible adds floats so.
#pragma once

#include "device/memory.cuh"

namespace fastattn {

// Adds, and returns what was there before.
FA_DEVICE float atomic_add(Global<float> to, float value) { return ::atomicAdd(to.pointer, value); }
FA_DEVICE int atomic_add(Global<int> to, int value) { return ::atomicAdd(to.pointer, value); }

}  // namespace fastattn
