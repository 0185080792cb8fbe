// The emulator's knobs for Python, through ctypes.
#include <cstdint>
#include <string>

#include "emulator/counts.h"
#include "emulator/machine.h"

#define FA_EXPORT extern "C" __attribute__((visibility("default")))

FA_EXPORT void fastattn_emulator_set_seed(uint64_t seed) { fastattn::emulator::set_seed(seed); }

// 0: bounds, alignment, deadlock and divergence only; 1: everything. Changed between ops.
FA_EXPORT void fastattn_emulator_check_level(int level) {
  using fastattn::emulator::Checks;
  fastattn::emulator::checks = level == 0 ? Checks::fast : Checks::all;
}

FA_EXPORT void fastattn_emulator_reset_counts() { fastattn::emulator::reset_counts(); }

// Valid until the next call.
FA_EXPORT const char* fastattn_emulator_counts_json() {
  static std::string text;
  text = fastattn::emulator::counts_json();
  return text.c_str();
}
