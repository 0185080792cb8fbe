// The threads that touched a byte, as the checks of memory remember them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "emulator/machine.h"
#include "emulator/region.h"
#include "emulator/where.h"

namespace fastattn::emulator {

// Lines of kernels, as small numbers.
int site_of(Where where);
Where where_of(int site);

// An access in 64 bits. `serial` numbers the blocks that ran, and is never 0; `epoch` is the warp's
// (see Warp); `many` stands for several lanes of the thread's warp.
class Record {
 public:
  static constexpr int serial_bits = 21, epoch_bits = 19;

  Record() = default;
  Record(uint32_t serial, uint32_t epoch, int thread, bool atomic, int site)
      : bits_(serial | uint64_t{epoch} << 21 | static_cast<uint64_t>(thread) << 40 |
              uint64_t{atomic} << 51 | static_cast<uint64_t>(site) << 52) {}
  uint32_t serial() const { return bits_ & ((1u << serial_bits) - 1); }
  uint32_t epoch() const { return bits_ >> 21 & ((1u << epoch_bits) - 1); }
  int thread() const { return bits_ >> 40 & 1023; }
  int warp() const { return thread() / lanes; }
  bool many() const { return bits_ >> 50 & 1; }
  bool atomic() const { return bits_ >> 51 & 1; }
  int site() const { return static_cast<int>(bits_ >> 52); }
  bool none() const { return bits_ == 0; }
  Record with_many() const {
    Record record = *this;
    record.bits_ |= 1ull << 50;
    return record;
  }
  bool operator==(const Record& other) const { return bits_ == other.bits_; }

 private:
  uint64_t bits_ = 0;
};

// A byte's last write, and two of its reads since.
struct Cell {
  Record written, read[2];
  bool operator==(const Cell& other) const {
    return written == other.written && read[0] == other.read[0] && read[1] == other.read[1];
  }
};

// The parts of a byte's state.
constexpr uint8_t initialised = 1, writable = 2, in_copy = 4;

// The shadow of some bytes side by side.
struct Shadow {
  uint8_t* states;
  Cell* cells;
  // Records of blocks from this one on are of the memory's present life, which for shared memory
  // is the block, for global memory the launch.
  uint32_t first_serial;
};

constexpr uintptr_t page_bytes = 1024;
struct Page {
  Cell cells[page_bytes];
  uint8_t states[page_bytes];
};

// Regions and shadow pages of the tensors that this thread of the CPU has given to kernels.
class Registry {
 public:
  // The page of the bytes from number * page_bytes on, null if no output has bytes there.
  Page* find(uintptr_t number) const {
    if (slots_.empty()) return nullptr;
    for (size_t i = first_slot(number);; i = (i + 1) & (slots_.size() - 1)) {
      if (slots_[i].page == nullptr || slots_[i].number == number) return slots_[i].page;
    }
  }

  Page& make(uintptr_t number);
  void clear();
  // Old records of blocks would be taken for new ones once their numbers begin again.
  void forget_records();
  ~Registry();

  std::vector<std::unique_ptr<Region>> regions;
  int depth = 0;
  uint64_t round = 0;  // of the serials in the records

 private:
  struct Slot {
    uintptr_t number = 0;
    Page* page = nullptr;
  };
  static constexpr size_t pages_per_slab = 64;

  size_t first_slot(uintptr_t number) const { return number * 0x9e3779b97f4a7c15ull >> shift_; }
  void insert(Slot slot);
  void grow();

  std::vector<Slot> slots_;
  int shift_ = 0;
  size_t used_ = 0;
  std::vector<Page*> slabs_;
};

extern thread_local Registry registry;

}  // namespace fastattn::emulator
