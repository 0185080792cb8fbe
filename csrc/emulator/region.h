// A tensor's memory as a launcher gave it to a kernel.
#pragma once

#include <cstdint>
#include <string>

namespace fastattn::emulator {

struct Region {
  uintptr_t begin = 0, end = 0;
  bool output = false, launched = false;
  std::string text;  // of which kind and shape
};

}  // namespace fastattn::emulator
