// The host's side: torch's tensors as places of memory, the device and the stream of a call.
//
// Only torch's stable ABI is used (torch/csrc/stable), of torch 2.10 and later.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <stdexcept>

#include "device/launch.cuh"
#include "device/memory.cuh"

// A torch without CUDA lacks this symbol, and must be able to load the library and to say so.
#pragma weak aoti_torch_get_current_cuda_stream

// The dispatch key under which the ops are registered.
#define FA_DISPATCH_KEY CUDA

namespace fastattn {

using torch::stable::Tensor;

// The memory of a tensor that a kernel reads, at its first element; a null place for none.
template <class T>
Global<const T> input(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.data_ptr())};
}
template <class T>
Global<const T> input(const std::optional<Tensor>& tensor) {
  return tensor ? input<T>(*tensor) : Global<const T>{nullptr};
}

// The memory of a tensor that a kernel writes; what it held before is lost.
template <class T>
Global<T> output(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr())};
}
template <class T>
Global<T> output(const std::optional<Tensor>& tensor) {
  return tensor ? output<T>(*tensor) : Global<T>{nullptr};
}

// Makes a tensor's device the current one while it lives, and has torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr) {
      throw std::runtime_error("fastattn: this torch is built without CUDA");
    }
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<Stream>(stream);
  }
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_ = nullptr;
};

}  // namespace fastattn
