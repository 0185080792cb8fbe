// Copies of 16 bytes from global to shared memory that run beside the thread (PTX ISA, "cp.async",
// "cp.async.commit_group", "cp.async.wait_group").
//
// The data may be read after a wait of the thread that copied it, and by other threads after a
// barrier after that wait.
#pragma once

#include "device/memory.cuh"

namespace fastattn {

// 16 bytes, past the L1 cache; zeros if not `valid`, and then `from` is not read, but aligned all
// the same.
template <class T>
FA_DEVICE void copy_async(Shared<T> to, Global<const T> from, bool valid = true) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to.pointer));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(from.pointer), "r"(bytes)
               : "memory");
}

// Closes a group of the copies that this thread began since the last one.
FA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until at most Pending of this thread's groups, the youngest, are under way.
template <int Pending>
FA_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(Pending) : "memory");
}

}  // namespace fastattn
