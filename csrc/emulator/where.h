// The line of a kernel at which a primitive is called: every primitive takes one as its last
// argument, which the compiler fills in.
#pragma once

namespace fastattn::emulator {

struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Where& other) const { return file == other.file && line == other.line; }
};

}  // namespace fastattn::emulator
