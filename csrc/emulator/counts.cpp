#include "emulator/counts.h"

namespace fastattn::emulator {

namespace {

Counts outside_of_kernels;

constexpr struct {
  const char* name;
  uint64_t Counts::*member;
} entries[] = {
    {"launches", &Counts::launches},
    {"blocks", &Counts::blocks},
    {"threads", &Counts::threads},
    {"shared_bytes", &Counts::shared_bytes},
    {"global_bytes_read", &Counts::global_bytes_read},
    {"global_bytes_written", &Counts::global_bytes_written},
    {"shared_bytes_read", &Counts::shared_bytes_read},
    {"shared_bytes_written", &Counts::shared_bytes_written},
    {"global_accesses", &Counts::global_accesses},
    {"global_sectors", &Counts::global_sectors},
    {"shared_accesses", &Counts::shared_accesses},
    {"bank_conflicts", &Counts::bank_conflicts},
    {"exp2", &Counts::exp2},
    {"async_copies", &Counts::async_copies},
    {"atomics", &Counts::atomics},
    {"mma", &Counts::mma},
    {"load_matrices", &Counts::load_matrices},
    {"shuffles", &Counts::shuffles},
    {"warp_syncs", &Counts::warp_syncs},
    {"block_syncs", &Counts::block_syncs},
    {"named_syncs", &Counts::named_syncs},
    {"named_arrivals", &Counts::named_arrivals},
};

}  // namespace

Counts* counts = &outside_of_kernels;
std::map<std::string, Counts> all_counts;

std::string counts_json() {
  std::string text = "{";
  for (const auto& [kernel, of_kernel] : all_counts) {
    if (text.size() > 1) text += ", ";
    text += "\"" + kernel + "\": {";
    for (const auto& entry : entries) {
      if (text.back() != '{') text += ", ";
      text += std::string("\"") + entry.name + "\": " + std::to_string(of_kernel.*entry.member);
    }
    text += "}";
  }
  return text + "}";
}

void reset_counts() {
  all_counts.clear();
  counts = &outside_of_kernels;
}

}  // namespace fastattn::emulator
