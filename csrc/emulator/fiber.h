// Fibers: call stacks that take turns on one thread of the CPU, some 5 ns a turn.
#pragma once

namespace fastattn::emulator {

// The stack on which fiber number `index` runs; memory below its end is a guard page.
void* stack_top(int index);

// A stack pointer for switch_stack that begins entry() on the stack. entry must not return.
void* prepare_stack(void* top, void (*entry)());

// Leaves the running stack, whose pointer goes to *from, for another one.
extern "C" void fastattn_switch_stack(void** from, void* to);

}  // namespace fastattn::emulator
