#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

// A switch saves what a called function must preserve (System V ABI for x86-64, AAPCS64) on the
// stack that it leaves, and returns on the other one.
#if defined(__x86_64__)
asm(R"(
.text
.hidden fastattn_switch_stack
.globl fastattn_switch_stack
.type fastattn_switch_stack, @function
fastattn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastattn_switch_stack, .-fastattn_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
.text
.hidden fastattn_switch_stack
.globl fastattn_switch_stack
.type fastattn_switch_stack, %function
fastattn_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fastattn_switch_stack, .-fastattn_switch_stack
)");
#else
#error "the emulator's fibers are written for x86-64 and aarch64"
#endif

namespace fastattn::emulator {

namespace {

constexpr size_t stack_bytes = 256 * 1024;
constexpr size_t guard_bytes = 64 * 1024;  // a multiple of every page size

}  // namespace

void* stack_top(int index) {
  static std::vector<char*> stacks;  // only pages that were used cost memory
  while (static_cast<int>(stacks.size()) <= index) {
    void* memory = mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard_bytes, PROT_NONE) != 0) {
      throw std::runtime_error("fastattn emulator: no memory for the stacks of threads");
    }
    stacks.push_back(static_cast<char*>(memory));
  }
  // Stacks begin at different lines of the cache, which could not hold them all otherwise.
  const size_t colour = static_cast<size_t>(index) * 2112 % 32768 / 64 * 64;
  return stacks[static_cast<size_t>(index)] + guard_bytes + stack_bytes - colour;
}

void* prepare_stack(void* top, void (*entry)()) {
  void** stack = static_cast<void**>(top);
#if defined(__x86_64__)
  *--stack = nullptr;  // where entry would return to; keeps its stack aligned
  *--stack = reinterpret_cast<void*>(entry);
  return stack - 6;
#else
  stack -= 20;
  stack[11] = reinterpret_cast<void*>(entry);
  return stack;
#endif
}

}  // namespace fastattn::emulator
