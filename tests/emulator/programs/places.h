// Memory for the tests' kernels, given to them as a launcher gives tensors.
#pragma once

#include <cstdint>
#include <vector>

#include "device/memory.cuh"

namespace fastattn {

template <class T>
Global<const T> given(const T* data, int64_t size) {
  const int64_t one = 1;
  return {data, emulator::give_input(data, sizeof(T), 1, &size, &one)};
}
template <class T>
Global<T> taken(T* data, int64_t size) {
  const int64_t one = 1;
  return {data, emulator::give_output(data, sizeof(T), 1, &size, &one)};
}

// `size` elements that begin at a multiple of 256 bytes, as torch's do.
template <class T>
struct Buffer {
  explicit Buffer(int64_t size) : size(size), bytes(size * sizeof(T) + 256) {}
  T* data() {
    const auto begin = reinterpret_cast<uintptr_t>(bytes.data());
    return reinterpret_cast<T*>((begin + 255) / 256 * 256);
  }
  Global<const T> input() { return given<T>(data(), size); }
  Global<T> output() { return taken<T>(data(), size); }

  int64_t size;
  std::vector<unsigned char> bytes;
};

}  // namespace fastattn
