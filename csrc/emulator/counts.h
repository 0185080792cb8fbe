// The work of a kernel, summed over its launches.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace fastattn::emulator {

struct Counts {
  uint64_t launches = 0, blocks = 0;
  uint64_t threads = 0, shared_bytes = 0;  // of a block of the latest launch
  // Bytes that threads asked for, asynchronous copies included.
  uint64_t global_bytes_read = 0, global_bytes_written = 0;
  uint64_t shared_bytes_read = 0, shared_bytes_written = 0;
  // Accesses of whole warps, and the 32-byte sectors of global memory that they touch. A shared
  // access that takes n turns because of its banks has n - 1 conflicts. Not counted with the
  // checks `fast`.
  uint64_t global_accesses = 0, global_sectors = 0;
  uint64_t shared_accesses = 0, bank_conflicts = 0;
  // Of threads.
  uint64_t exp2 = 0, async_copies = 0, atomics = 0;
  // Of warps.
  uint64_t mma = 0, load_matrices = 0, shuffles = 0, warp_syncs = 0, block_syncs = 0;
  uint64_t named_syncs = 0, named_arrivals = 0;
};

extern Counts* counts;  // of the kernel that runs
extern std::map<std::string, Counts> all_counts;

// {"kernel": {"launches": 1, ...}, ...}
std::string counts_json();
void reset_counts();

}  // namespace fastattn::emulator
