// The host's twin of csrc/device/tensor.cuh: torch's tensors on the CPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "device/launch.cuh"
#include "device/memory.cuh"

#define FA_DISPATCH_KEY CPU

namespace fastattn {

using torch::stable::Tensor;

template <class T>
Global<const T> input(const Tensor& tensor) {
  const auto* data = static_cast<const T*>(tensor.data_ptr());
  return {data, emulator::give_input(data, static_cast<int>(tensor.element_size()),
                                     static_cast<int>(tensor.dim()), tensor.sizes().data(),
                                     tensor.strides().data())};
}
template <class T>
Global<const T> input(const std::optional<Tensor>& tensor) {
  return tensor ? input<T>(*tensor) : Global<const T>{nullptr};
}

template <class T>
Global<T> output(const Tensor& tensor) {
  auto* data = static_cast<T*>(tensor.data_ptr());
  return {data, emulator::give_output(data, static_cast<int>(tensor.element_size()),
                                      static_cast<int>(tensor.dim()), tensor.sizes().data(),
                                      tensor.strides().data())};
}
template <class T>
Global<T> output(const std::optional<Tensor>& tensor) {
  return tensor ? output<T>(*tensor) : Global<T>{nullptr};
}

// The scope of an op: what its launches wrote is remembered until it ends.
class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  Stream stream() const { return nullptr; }

 private:
  emulator::Scope scope_;
};

}  // namespace fastattn
