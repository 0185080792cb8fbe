// Tensors as kernels see them: their bounds, and shadow pages for the bytes of outputs.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "emulator/checks.h"
#include "emulator/machine.h"
#include "emulator/records.h"

namespace fastattn::emulator {

thread_local Registry registry;

Page& Registry::make(uintptr_t number) {
  if (Page* page = find(number)) return *page;
  if (2 * (used_ + 1) > slots_.size()) grow();
  if (used_ == pages_per_slab * slabs_.size()) {
    void* memory = mmap(nullptr, pages_per_slab * sizeof(Page), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("fastattn emulator: out of memory");
    slabs_.push_back(static_cast<Page*>(memory));
  }
  Page* page = slabs_[used_ / pages_per_slab] + used_ % pages_per_slab;
  ++used_;
  std::memset(page->states, initialised, page_bytes);
  insert({number, page});
  return *page;
}

void Registry::clear() {
  regions.clear();
  std::fill(slots_.begin(), slots_.end(), Slot());
  used_ = 0;
}

void Registry::forget_records() {
  for (Page* slab : slabs_) {
    for (size_t i = 0; i < pages_per_slab; ++i) {
      std::memset(static_cast<void*>(slab[i].cells), 0, sizeof slab[i].cells);
    }
  }
}

Registry::~Registry() {
  for (Page* slab : slabs_) munmap(slab, pages_per_slab * sizeof(Page));
}

void Registry::insert(Slot slot) {
  size_t i = first_slot(slot.number);
  while (slots_[i].page != nullptr) i = (i + 1) & (slots_.size() - 1);
  slots_[i] = slot;
}

void Registry::grow() {
  std::vector<Slot> old = std::move(slots_);
  slots_.assign(std::max<size_t>(64, 2 * old.size()), Slot());
  shift_ = 64 - __builtin_ctzll(slots_.size());
  for (const Slot& slot : old) {
    if (slot.page != nullptr) insert(slot);
  }
}

namespace {

// Calls run(first, end) for the contiguous runs of a tensor's bytes.
template <class Run>
void for_each_run(uintptr_t begin, int element, int dims, const int64_t* sizes,
                  const int64_t* strides, const Run& run) {
  struct Dim {
    int64_t size, stride;
  };
  std::vector<Dim> order;
  for (int i = 0; i < dims; ++i) {
    if (sizes[i] == 0) return;
    if (sizes[i] > 1 && strides[i] != 0) order.push_back({sizes[i], strides[i] * element});
  }
  std::sort(order.begin(), order.end(), [](Dim a, Dim b) { return a.stride < b.stride; });
  int64_t bytes = element;
  while (!order.empty() && order.front().stride == bytes) {
    bytes *= order.front().size;
    order.erase(order.begin());
  }
  std::vector<int64_t> at(order.size(), 0);
  for (;;) {
    run(begin, begin + static_cast<uintptr_t>(bytes));
    size_t dim = 0;
    for (; dim < order.size(); ++dim) {
      begin += static_cast<uintptr_t>(order[dim].stride);
      if (++at[dim] < order[dim].size) break;
      begin -= static_cast<uintptr_t>(order[dim].stride * order[dim].size);
      at[dim] = 0;
    }
    if (dim == order.size()) return;
  }
}

void change_states(uintptr_t begin, uintptr_t end, uint8_t set, uint8_t cleared) {
  while (begin < end) {
    Page& page = registry.make(begin / page_bytes);
    const uintptr_t stop = std::min(end, (begin / page_bytes + 1) * page_bytes);
    for (; begin < stop; ++begin) {
      uint8_t& state = page.states[begin % page_bytes];
      state = static_cast<uint8_t>((state | set) & ~cleared);
    }
  }
}

Region& give(const void* data, bool output, int element, int dims, const int64_t* sizes,
             const int64_t* strides) {
  auto region = std::make_unique<Region>();
  int64_t elements = 1;
  std::string shape, steps;
  for (int i = 0; i < dims; ++i) {
    elements = sizes[i] == 0 ? 0 : elements + (sizes[i] - 1) * strides[i];
    if (elements == 0) break;
  }
  for (int i = 0; i < dims; ++i) {
    shape += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
    steps += (i > 0 ? ", " : "") + std::to_string(strides[i]);
  }
  region->begin = reinterpret_cast<uintptr_t>(data);
  region->end = region->begin + static_cast<uintptr_t>(elements * element);
  region->output = output;
  region->text = std::string(output ? "an output" : "an input") + " of " +
                 std::to_string(region->end - region->begin) + " bytes (shape (" + shape +
                 "), strides (" + steps + "), elements of " + std::to_string(element) + " bytes)";
  registry.regions.push_back(std::move(region));
  return *registry.regions.back();
}

}  // namespace

const Region* give_input(const void* data, int element, int dims, const int64_t* sizes,
                         const int64_t* strides) {
  Region& region = give(data, false, element, dims, sizes, strides);
  if (checks == Checks::fast) return &region;
  for (const auto& other : registry.regions) {
    // Output and input of the same launch: the kernel works in place.
    if (other->output && !other->launched && other->begin == region.begin) {
      for_each_run(region.begin, element, dims, sizes, strides, [](uintptr_t first, uintptr_t end) {
        change_states(first, end, initialised, 0);
      });
      break;
    }
  }
  return &region;
}

const Region* give_output(void* data, int element, int dims, const int64_t* sizes,
                          const int64_t* strides) {
  uint8_t lost = initialised;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  for (const auto& other : registry.regions) {
    if (other->begin == begin && other->end > begin) lost = 0;
  }
  Region& region = give(data, true, element, dims, sizes, strides);
  if (checks == Checks::fast) return &region;
  for_each_run(begin, element, dims, sizes, strides, [&](uintptr_t first, uintptr_t end) {
    change_states(first, end, writable, lost);
  });
  return &region;
}

Scope::Scope() { ++registry.depth; }
Scope::~Scope() {
  if (--registry.depth == 0) registry.clear();
}

}  // namespace fastattn::emulator
