#include "emulator/checks.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "emulator/counts.h"
#include "emulator/machine.h"
#include "emulator/records.h"

namespace fastattn::emulator {

namespace {

// A cp.async of 16 bytes.
struct Copy {
  unsigned char* to;
  const Region* region;
  const void* from;
  bool late;  // reads its source when it arrives
  unsigned char data[16];
  Where where;
};

// A thread's copies under way, the oldest first.
struct Copies {
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // where in `copies` each one ends

  void arrive_until(int pending);
  void clear() {
    copies.clear();
    groups.clear();
  }
};

struct Memory {
  Registry* registry = nullptr;
  uint32_t serial = 0, launch_serial = 1;  // of this block, of the launch's first block
  uint64_t round = 0;                      // how often serials began again
  std::vector<int> blocks[3];              // of the launch, in the order in which they ran
  int shared_bytes = 0;
  alignas(1024) unsigned char shared[max_shared];
  uint8_t states[max_shared];
  Cell cells[max_shared];
  Copies copies[max_threads];
} memory;

// Whether a thread, by what it knows now, comes after an access.
bool is_before(Record record, uint32_t first_serial, const Warp& warp, int thread) {
  if (record.none()) return true;
  if (record.serial() != memory.serial) return record.serial() < first_serial;
  if (record.warp() != warp.index) return record.epoch() <= warp.knows[record.warp()];
  return (record.thread() == thread && !record.many()) || record.epoch() < warp.ordered;
}

const char* verb(Access access) {
  return access == Access::read ? "read" : access == Access::write ? "write" : "atomic";
}

std::string text_of_access(Access access, int bytes, const std::string& place, Where where) {
  return std::string("  access: ") + verb(access) + " of " + std::to_string(bytes) +
         " bytes at " + place + ", " + text_of(where) + "\n";
}

std::string text_of_alignment(uintptr_t address, int bytes) {
  return "  aligned: to " + std::to_string(address & -address) + " bytes, must be to " +
         std::to_string(bytes) + "\n";
}

std::string text_of_record(Record record, bool written) {
  std::string text = std::string("  before: ") +
                     (record.atomic() ? "atomic" : written ? "write" : "read") + " of thread " +
                     std::to_string(record.thread()) + " (warp " + std::to_string(record.warp()) +
                     ", lane " + std::to_string(record.thread() % lanes) + ")";
  if (record.many()) text += " and other lanes";
  if (record.serial() != memory.serial) {
    const size_t i = record.serial() - memory.launch_serial;
    text += " of block (" + std::to_string(memory.blocks[0][i]) + ", " +
            std::to_string(memory.blocks[1][i]) + ", " + std::to_string(memory.blocks[2][i]) + ")";
  }
  return text + ", " + text_of(where_of(record.site())) + "\n";
}

// Puts a read into one of a byte's two slots.
void note_read(Cell& cell, Record now, uint32_t first_serial, const Warp& warp, int thread) {
  for (Record& slot : cell.read) {
    if (!slot.none() && slot.serial() == now.serial() && slot.warp() == now.warp() &&
        slot.epoch() == now.epoch()) {
      slot = slot.many() || slot.thread() != thread ? now.with_many() : now;
      return;
    }
    if (is_before(slot, first_serial, warp, thread)) {
      slot = now;
      return;
    }
  }
  cell.read[draw(2)] = now;
}

// One access to bytes side by side; most often one record holds for all of them.
template <class Place>
void check_bytes(Shadow shadow, int bytes, Access access, int thread, Where where,
                 const char* kind, const Place& place) {
  const Warp& warp = warp_of(thread);
  if (warp.epoch >> Record::epoch_bits != 0) fail("too many barriers in a block", "");
  const Record now(memory.serial, warp.epoch, thread, access == Access::atomic, site_of(where));
  const auto fail_with = [&](const std::string& what, int byte, const std::string& more = "") {
    fail_access(what + " " + kind + " memory", thread,
                text_of_access(access, bytes, place(), where) +
                    (byte > 0 ? "  of it: byte " + std::to_string(byte) + " and following\n" : "") +
                    more);
  };
  constexpr char no_order[] = "  order: none between them\n";
  const uint8_t needed = access == Access::write ? writable : initialised;
  Cell seen, noted;
  for (int i = 0; i < bytes; ++i) {
    const uint8_t state = shadow.states[i];
    Cell& cell = shadow.cells[i];
    if (state & in_copy) {
      fail_with(std::string(verb(access)) + " under an asynchronous copy that is not waited for,",
                i, text_of_record(cell.written, true));
    }
    if (!(state & needed)) {
      fail_with(access == Access::write ? "write outside the tensor's elements,"
                                        : "read of uninitialised",
                i);
    }
    if (i == 0 || !(cell == seen)) {
      seen = noted = cell;
      const bool both_atomic = access == Access::atomic && cell.written.atomic();
      if (!both_atomic && !is_before(cell.written, shadow.first_serial, warp, thread)) {
        fail_with("race on", i, text_of_record(cell.written, true) + no_order);
      }
      if (access == Access::read) {
        note_read(noted, now, shadow.first_serial, warp, thread);
      } else {
        for (const Record read : cell.read) {
          if (!is_before(read, shadow.first_serial, warp, thread)) {
            fail_with("race on", i, text_of_record(read, false) + no_order);
          }
        }
        noted = {now, {}};
      }
    }
    cell = noted;
    if (access != Access::read) shadow.states[i] = state | initialised;
  }
}

int offset_in_shared(const void* at) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(at) -
                          reinterpret_cast<uintptr_t>(memory.shared));
}

std::string text_of_place(const Region& region, const void* at) {
  return "byte " +
         std::to_string(static_cast<int64_t>(reinterpret_cast<uintptr_t>(at) - region.begin)) +
         " of " + region.text;
}

// The shadow's part of a check of global memory.
void check_global_bytes(const Region* region, const void* at, int bytes, Access access,
                        Where where) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  Page* page = memory.registry->find(address / page_bytes);
  if (page == nullptr && access == Access::read) return;  // nobody can write it
  if (page == nullptr) {
    fail_access("write outside the tensor's elements, global memory", position.thread,
                text_of_access(access, bytes, text_of_place(*region, at), where));
  }
  const uintptr_t offset = address % page_bytes;
  check_bytes({page->states + offset, page->cells + offset, memory.launch_serial}, bytes, access,
              position.thread, where, "global", [&] { return text_of_place(*region, at); });
}

void arrive(const Copy& copy) {
  if (copy.late) {
    if (checks == Checks::all) {
      check_global_bytes(copy.region, copy.from, 16, Access::read, copy.where);
    }
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memcpy(copy.to, copy.data, 16);
  }
  if (checks == Checks::fast) return;
  const int thread = position.thread, offset = offset_in_shared(copy.to);
  const Record now(memory.serial, warp_of(thread).epoch, thread, false, site_of(copy.where));
  for (int i = offset; i < offset + 16; ++i) {
    memory.states[i] = initialised | writable;
    memory.cells[i] = {now, {}};
  }
}

void Copies::arrive_until(int pending) {
  const auto done = static_cast<int>(groups.size()) - pending;
  if (done <= 0) return;
  const size_t end = groups[static_cast<size_t>(done) - 1];
  for (size_t i = 0; i < end; ++i) arrive(copies[i]);
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(end));
  groups.erase(groups.begin(), groups.begin() + done);
  for (size_t& group : groups) group -= end;
}

}  // namespace

unsigned char* shared_base() { return memory.shared; }

void check_global(const Region* region, const void* at, int bytes, Access access, Where where) {
  const int thread = position.thread;
  const auto address = reinterpret_cast<uintptr_t>(at);
  if (region == nullptr) {
    fail_access("access to a place that no tensor gave", thread,
                text_of_access(access, bytes, at == nullptr ? "null" : "an address", where));
  }
  if (address < region->begin || address + static_cast<uintptr_t>(bytes) > region->end) {
    fail_access("out of bounds in global memory", thread,
                text_of_access(access, bytes, text_of_place(*region, at), where));
  }
  if (address % static_cast<uintptr_t>(bytes) != 0) {
    fail_access("misaligned access to global memory", thread,
                text_of_access(access, bytes, text_of_place(*region, at), where) +
                    text_of_alignment(address, bytes));
  }
  if (access != Access::write) counts->global_bytes_read += static_cast<uint64_t>(bytes);
  if (access != Access::read) counts->global_bytes_written += static_cast<uint64_t>(bytes);
  if (access == Access::atomic) ++counts->atomics;
  if (checks == Checks::fast) return;
  note_access(thread, at, bytes, false, where);
  check_global_bytes(region, at, bytes, access, where);
}

void check_shared_by(int thread, const void* at, int bytes, Access access, Where where) {
  const int offset = offset_in_shared(at);
  const auto place = [&] { return "shared byte " + std::to_string(offset); };
  if (offset < 0 || offset + bytes > memory.shared_bytes) {
    fail_access("out of bounds in shared memory", thread,
                text_of_access(access, bytes, place(), where) + "  bounds: " +
                    std::to_string(memory.shared_bytes) + " bytes\n");
  }
  if (offset % bytes != 0) {
    fail_access("misaligned access to shared memory", thread,
                text_of_access(access, bytes, place(), where) +
                    text_of_alignment(static_cast<uintptr_t>(offset), bytes));
  }
  (access == Access::read ? counts->shared_bytes_read : counts->shared_bytes_written) +=
      static_cast<uint64_t>(bytes);
  if (checks == Checks::fast) return;
  note_access(thread, at, bytes, true, where);
  check_bytes({memory.states + offset, memory.cells + offset, memory.serial}, bytes, access, thread,
              where, "shared", place);
}

void check_shared(const void* at, int bytes, Access access, Where where) {
  check_shared_by(position.thread, at, bytes, access, where);
}

void begin_copy(void* to, const Region* region, const void* from, bool valid, Where where) {
  ++counts->async_copies;
  const auto address = reinterpret_cast<uintptr_t>(from);
  if (valid) {
    check_global(region, from, 16, Access::read, where);
  } else if (address % 16 != 0) {  // of a copy that reads nothing as well
    fail_access("misaligned access to global memory", position.thread,
                text_of_access(Access::read, 16, "a place that is not read", where) +
                    text_of_alignment(address, 16));
  }
  check_shared(to, 16, Access::write, where);
  auto* bytes = static_cast<unsigned char*>(to);
  Copy copy = {bytes, region, from, valid && draw(2) == 0, {}, where};
  if (valid) std::memcpy(copy.data, from, 16);
  std::memset(bytes, 0xff, 16);
  if (checks == Checks::all) std::memset(memory.states + offset_in_shared(to), in_copy, 16);
  memory.copies[position.thread].copies.push_back(copy);
}

void commit_copies() {
  Copies& copies = memory.copies[position.thread];
  copies.groups.push_back(copies.copies.size());
}

void wait_copies(int pending) {
  take_turns();
  memory.copies[position.thread].arrive_until(pending);
}

void memory_begin_launch(int64_t blocks) {
  constexpr int64_t most = (1 << Record::serial_bits) - 1;
  if (blocks > most) {
    throw std::runtime_error("fastattn emulator: a grid of more than " + std::to_string(most) +
                             " blocks");
  }
  if (memory.serial + blocks > most) {
    memory.serial = 0;
    ++memory.round;
    std::memset(static_cast<void*>(memory.cells), 0, sizeof memory.cells);
  }
  if (registry.round != memory.round) {
    registry.round = memory.round;
    registry.forget_records();
  }
  memory.registry = &registry;
  for (const auto& region : registry.regions) region->launched = true;
  for (auto& numbers : memory.blocks) numbers.clear();
  memory.launch_serial = memory.serial + 1;
}

void memory_begin_block(int shared_bytes) {
  ++memory.serial;
  for (int axis = 0; axis < 3; ++axis) memory.blocks[axis].push_back(position.block[axis]);
  memory.shared_bytes = shared_bytes;
  std::memset(memory.shared, 0xff, static_cast<size_t>(shared_bytes));
  std::memset(memory.states, writable, static_cast<size_t>(shared_bytes));
  for (int thread = 0; thread < position.threads; ++thread) memory.copies[thread].clear();
  forget_accesses();
}

}  // namespace fastattn::emulator
