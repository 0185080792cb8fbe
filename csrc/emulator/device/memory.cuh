// The host's twin of csrc/device/memory.cuh: every access is checked before it is done.
#pragma once

#include <cstring>
#include <type_traits>

#include "device/types.cuh"
#include "emulator/checks.h"

namespace fastattn {

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
  FA_HOST_DEVICE T& operator[](int i) { return values[i]; }
  FA_HOST_DEVICE const T& operator[](int i) const { return values[i]; }
};

template <class T>
struct Global {
  T* pointer;
  const emulator::Region* region = nullptr;  // what input() and output() know about it
  FA_HOST_DEVICE Global operator+(int64_t elements) const {
    // In integers: a place outside of the tensor may be named, though not read.
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    return {reinterpret_cast<T*>(address + static_cast<uintptr_t>(elements) * sizeof(T)), region};
  }
  FA_HOST_DEVICE explicit operator bool() const { return pointer != nullptr; }
};

template <class T>
struct Shared {
  T* pointer;
  FA_DEVICE Shared operator+(int elements) const {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    return {reinterpret_cast<T*>(address + static_cast<uintptr_t>(elements) * sizeof(T))};
  }
};

template <class U, class T>
FA_HOST_DEVICE Global<U> place_as(Global<T> place) {
  return {reinterpret_cast<U*>(place.pointer), place.region};
}

template <class T>
FA_DEVICE Shared<T> shared_memory(int bytes) {
  return {reinterpret_cast<T*>(emulator::shared_base() + bytes)};
}

template <class T>
FA_DEVICE std::remove_const_t<T> load(Global<T> from,
                                      emulator::Where where = emulator::Where::here()) {
  emulator::check_global(from.region, from.pointer, sizeof(T), emulator::Access::read, where);
  return *from.pointer;
}
template <class T>
FA_DEVICE void store(Global<T> to, T value, emulator::Where where = emulator::Where::here()) {
  emulator::check_global(to.region, to.pointer, sizeof(T), emulator::Access::write, where);
  *to.pointer = value;
}
template <class T>
FA_DEVICE std::remove_const_t<T> load(Shared<T> from,
                                      emulator::Where where = emulator::Where::here()) {
  emulator::check_shared(from.pointer, sizeof(T), emulator::Access::read, where);
  return *from.pointer;
}
template <class T>
FA_DEVICE void store(Shared<T> to, T value, emulator::Where where = emulator::Where::here()) {
  emulator::check_shared(to.pointer, sizeof(T), emulator::Access::write, where);
  *to.pointer = value;
}

template <int N, class T>
FA_DEVICE Vector<std::remove_const_t<T>, N> load_vector(
    Global<T> from, emulator::Where where = emulator::Where::here()) {
  Vector<std::remove_const_t<T>, N> value;
  static_assert(sizeof(value) <= 16, "one access has at most 16 bytes");
  emulator::check_global(from.region, from.pointer, sizeof(value), emulator::Access::read, where);
  std::memcpy(&value, from.pointer, sizeof(value));
  return value;
}
template <int N, class T>
FA_DEVICE void store_vector(Global<T> to, Vector<T, N> value,
                            emulator::Where where = emulator::Where::here()) {
  static_assert(sizeof(value) <= 16, "one access has at most 16 bytes");
  emulator::check_global(to.region, to.pointer, sizeof(value), emulator::Access::write, where);
  std::memcpy(to.pointer, &value, sizeof(value));
}
template <int N, class T>
FA_DEVICE Vector<std::remove_const_t<T>, N> load_vector(
    Shared<T> from, emulator::Where where = emulator::Where::here()) {
  Vector<std::remove_const_t<T>, N> value;
  static_assert(sizeof(value) <= 16, "one access has at most 16 bytes");
  emulator::check_shared(from.pointer, sizeof(value), emulator::Access::read, where);
  std::memcpy(&value, from.pointer, sizeof(value));
  return value;
}
template <int N, class T>
FA_DEVICE void store_vector(Shared<T> to, Vector<T, N> value,
                            emulator::Where where = emulator::Where::here()) {
  static_assert(sizeof(value) <= 16, "one access has at most 16 bytes");
  emulator::check_shared(to.pointer, sizeof(value), emulator::Access::write, where);
  std::memcpy(to.pointer, &value, sizeof(value));
}

template <int N, class T>
FA_DEVICE Vector<std::remove_const_t<T>, N> load_vector_once(
    Global<T> from, emulator::Where where = emulator::Where::here()) {
  static_assert(sizeof(T) * N == 16, "16 bytes at once");
  return load_vector<N>(from, where);
}

}  // namespace fastattn
