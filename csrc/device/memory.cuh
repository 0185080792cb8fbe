// Global and shared memory: typed places, read and written by one element or by one vector.
//
// A place is a pointer that only these functions follow. On the GPU it is nothing else; in the
// emulator it knows its bounds, which bytes were ever written, and who touched them last.
// Vector accesses are one instruction of 4, 8 or 16 bytes (PTX ISA, "ld.global", "st.global",
// "ld.shared", "st.shared"), and their places must be aligned to as many.
#pragma once

#include <type_traits>

#include "device/types.cuh"

namespace fastattn {

// N elements side by side.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
  FA_HOST_DEVICE T& operator[](int i) { return values[i]; }
  FA_HOST_DEVICE const T& operator[](int i) const { return values[i]; }
};

template <class T>
struct Global {
  T* pointer;
  FA_HOST_DEVICE Global operator+(int64_t elements) const { return {pointer + elements}; }
  FA_HOST_DEVICE explicit operator bool() const { return pointer != nullptr; }
};

template <class T>
struct Shared {
  T* pointer;
  FA_DEVICE Shared operator+(int elements) const { return {pointer + elements}; }
};

// The same place as the first element of another type.
template <class U, class T>
FA_HOST_DEVICE Global<U> place_as(Global<T> place) {
  return {reinterpret_cast<U*>(place.pointer)};
}

// The block's dynamic shared memory, of the size given at the launch, aligned to 1024 bytes; a part
// of it that begins `bytes` after its start.
template <class T>
FA_DEVICE Shared<T> shared_memory(int bytes) {
  extern __shared__ __align__(1024) unsigned char fastattn_shared[];
  return {reinterpret_cast<T*>(fastattn_shared + bytes)};
}

template <class T>
FA_DEVICE std::remove_const_t<T> load(Global<T> from) {
  return *from.pointer;
}
template <class T>
FA_DEVICE void store(Global<T> to, T value) {
  *to.pointer = value;
}
template <class T>
FA_DEVICE std::remove_const_t<T> load(Shared<T> from) {
  return *from.pointer;
}
template <class T>
FA_DEVICE void store(Shared<T> to, T value) {
  *to.pointer = value;
}

template <int N, class T>
FA_DEVICE Vector<std::remove_const_t<T>, N> load_vector(Global<T> from) {
  using V = Vector<std::remove_const_t<T>, N>;
  static_assert(sizeof(V) <= 16, "one access has at most 16 bytes");
  return *reinterpret_cast<const V*>(from.pointer);
}
template <int N, class T>
FA_DEVICE void store_vector(Global<T> to, Vector<T, N> value) {
  static_assert(sizeof(value) <= 16, "one access has at most 16 bytes");
  *reinterpret_cast<Vector<T, N>*>(to.pointer) = value;
}
template <int N, class T>
FA_DEVICE Vector<std::remove_const_t<T>, N> load_vector(Shared<T> from) {
  using V = Vector<std::remove_const_t<T>, N>;
  static_assert(sizeof(V) <= 16, "one access has at most 16 bytes");
  return *reinterpret_cast<const V*>(from.pointer);
}
template <int N, class T>
FA_DEVICE void store_vector(Shared<T> to, Vector<T, N> value) {
  static_assert(sizeof(value) <= 16, "one access has at most 16 bytes");
  *reinterpret_cast<Vector<T, N>*>(to.pointer) = value;
}

// 16 bytes that this kernel reads once and nobody writes meanwhile: they leave the L1 cache to
// others (PTX ISA, "ld.global.nc", cache eviction priority L1::no_allocate).
template <int N, class T>
FA_DEVICE Vector<std::remove_const_t<T>, N> load_vector_once(Global<T> from) {
  using V = Vector<std::remove_const_t<T>, N>;
  static_assert(sizeof(V) == 16, "16 bytes at once");
  uint4 bits;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(from.pointer));
  return *reinterpret_cast<V*>(&bits);
}

}  // namespace fastattn
