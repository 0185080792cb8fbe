// Shared by the norms' launchers: tensors as kernels take them, and how rows are laid on threads.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "device/tensor.cuh"
#include "layer_norm/elements.cuh"

namespace fastattn {

using OptionalTensor = std::optional<Tensor>;

inline Element element_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::float32;
    case ScalarType::Half: return Element::float16;
    case ScalarType::BFloat16: return Element::bfloat16;
    default: throw std::runtime_error("fastattn: the norms take float16, bfloat16 and float32");
  }
}

inline Source source(const OptionalTensor& tensor) {
  if (!tensor) return {{nullptr}, Element::float32};
  return {input<unsigned char>(*tensor), element_of(*tensor)};
}
inline Sink sink(const OptionalTensor& tensor) {
  if (!tensor) return {{nullptr}, Element::float32};
  return {output<unsigned char>(*tensor), element_of(*tensor)};
}
inline int64_t row_stride(const OptionalTensor& tensor) { return tensor ? tensor->stride(0) : 0; }

// Whether every row of a tensor can be read V elements at a time, 16 bytes at most.
inline bool readable_by(int64_t V, const OptionalTensor& tensor) {
  if (!tensor) return true;
  const int64_t bytes = std::min<int64_t>(16, V * static_cast<int64_t>(tensor->element_size()));
  const bool rows = tensor->dim() == 1 || tensor->size(0) == 1 || tensor->stride(0) % V == 0;
  return rows && reinterpret_cast<uintptr_t>(tensor->data_ptr()) % bytes == 0;
}

// Which kernels take a call.
enum class Family {
  float16,       // all streams float16, 8 elements at a time
  bfloat16,      // all bfloat16, 8
  float32,       // all float32, 4
  mixed,         // any mixture, 4 (and streams of one 16-bit type in rows of 4 m elements)
  one_by_one,    // any, where rows are not aligned
};

inline int vector_of(Family family) {
  switch (family) {
    case Family::float16:
    case Family::bfloat16: return 8;
    case Family::float32:
    case Family::mixed: return 4;
    default: return 1;
  }
}

inline Family family_of(int64_t hidden, std::initializer_list<OptionalTensor> streams,
                        std::initializer_list<OptionalTensor> weights) {
  const Element first = element_of(**streams.begin());
  bool alike = true;
  for (const auto& tensor : streams) alike = alike && (!tensor || element_of(*tensor) == first);
  const auto fits = [&](int64_t V) {
    const auto readable = [V](const OptionalTensor& tensor) { return readable_by(V, tensor); };
    return hidden % V == 0 && std::all_of(streams.begin(), streams.end(), readable) &&
           std::all_of(weights.begin(), weights.end(), readable);
  };
  if (alike && first != Element::float32 && fits(8)) {
    return first == Element::float16 ? Family::float16 : Family::bfloat16;
  }
  if (!fits(4)) return Family::one_by_one;
  return alike && first == Element::float32 ? Family::float32 : Family::mixed;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads for `vectors` vectors, `each` a thread: RowThreads' `threads`.
inline int row_threads(int64_t vectors, int each) {
  const int64_t needed = ceil_div(vectors, each);
  if (needed > warp_threads) return static_cast<int>(ceil_div(needed, warp_threads)) * warp_threads;
  int threads = 1;
  while (threads < needed) threads *= 2;
  return threads;
}

// Rows that one pass keeps in registers; without vectors, half of that.
inline int64_t longest_row(Family family) { return family == Family::one_by_one ? 8192 : 16384; }
constexpr int long_row_threads = 512;

}  // namespace fastattn
