// The cost of a warp's accesses to memory: sectors of global memory, turns of shared memory's banks.
//
// Lanes run one after the other, so each keeps a log of its accesses, and when they meet, the logs
// are put side by side: what the lanes did at the same line is one access of the warp.
#include <algorithm>
#include <cstring>
#include <vector>

#include "emulator/checks.h"
#include "emulator/counts.h"
#include "emulator/machine.h"
#include "emulator/records.h"

namespace fastattn::emulator {

namespace {

constexpr int max_sites = 4096;
std::vector<Where> sites;

}  // namespace

int site_of(Where where) {
  struct Known {
    Where where;
    int site;
  };
  static Known known[1024] = {};
  const uintptr_t key = reinterpret_cast<uintptr_t>(where.file) * 31;
  Known& entry = known[(key + static_cast<uintptr_t>(where.line)) % 1024];
  if (entry.where == where) return entry.site;
  size_t site = 0;
  while (site < sites.size() && (sites[site].line != where.line ||
                                 std::strcmp(sites[site].file, where.file) != 0)) {
    ++site;
  }
  if (site == sites.size()) {
    if (site == max_sites) fail("more than 4096 lines of kernels access memory", "");
    sites.push_back(where);
  }
  entry = {where, static_cast<int>(site)};
  return entry.site;
}

Where where_of(int site) { return sites[static_cast<size_t>(site)]; }

namespace {

// One access of a lane, until its warp meets.
struct Entry {
  uintptr_t address;
  uint16_t site;
  uint8_t bytes;
  bool shared;
};

std::vector<Entry> logs[max_threads];

// How many turns a warp's access to shared memory takes beyond the necessary ones. A turn serves
// each of the 32 banks of 4 bytes once, and lanes of the same word together; of accesses of 8 and
// 16 bytes half and quarter warps come one after the other.
uint64_t count_conflicts(const uintptr_t (&address)[lanes], uint32_t members, int bytes) {
  const int at_once = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
  uint64_t conflicts = 0;
  for (int first = 0; first < lanes; first += at_once) {
    uintptr_t words[lanes][lanes];
    int of_bank[lanes] = {}, most = 1;
    for (int lane = first; lane < first + at_once; ++lane) {
      if (!(members >> lane & 1)) continue;
      for (uintptr_t word = address[lane] / 4; word <= (address[lane] + bytes - 1) / 4; ++word) {
        const uintptr_t bank = word % 32;
        int& number = of_bank[bank];
        if (std::find(words[bank], words[bank] + number, word) != words[bank] + number) continue;
        words[bank][number++] = word;
        most = std::max(most, number);
      }
    }
    conflicts += static_cast<uint64_t>(most - 1);
  }
  return conflicts;
}

uint64_t count_sectors(const uintptr_t (&address)[lanes], uint32_t members) {
  uintptr_t sectors[lanes];
  int number = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    const uintptr_t sector = address[lane] / 32;
    if (members >> lane & 1 && std::find(sectors, sectors + number, sector) == sectors + number) {
      sectors[number++] = sector;
    }
  }
  return static_cast<uint64_t>(number);
}

}  // namespace

void note_access(int thread, const void* at, int bytes, bool shared, Where where) {
  logs[thread].push_back({reinterpret_cast<uintptr_t>(at), static_cast<uint16_t>(site_of(where)),
                          static_cast<uint8_t>(bytes), shared});
}

void forget_accesses() {
  for (int thread = 0; thread < position.threads; ++thread) logs[thread].clear();
}

void count_accesses(int warp) {
  if (checks == Checks::fast) return;
  auto* log = logs + warp * lanes;
  size_t next[lanes] = {}, left = 0;
  for (int lane = 0; lane < lanes; ++lane) left += log[lane].size();
  while (left > 0) {
    // The lane with most accesses left is the one that did more than others: it leads.
    int leader = 0;
    for (int lane = 1; lane < lanes; ++lane) {
      if (log[lane].size() - next[lane] > log[leader].size() - next[leader]) leader = lane;
    }
    const Entry entry = log[leader][next[leader]];
    uintptr_t address[lanes] = {};
    uint32_t members = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      if (next[lane] == log[lane].size()) continue;
      const Entry& other = log[lane][next[lane]];
      if (other.site != entry.site || other.bytes != entry.bytes || other.shared != entry.shared) {
        continue;
      }
      address[lane] = other.address;
      members |= 1u << lane;
      ++next[lane];
      --left;
    }
    if (entry.shared) {
      ++counts->shared_accesses;
      counts->bank_conflicts += count_conflicts(address, members, entry.bytes);
    } else {
      ++counts->global_accesses;
      counts->global_sectors += count_sectors(address, members);
    }
  }
  for (int lane = 0; lane < lanes; ++lane) log[lane].clear();
}

}  // namespace fastattn::emulator
