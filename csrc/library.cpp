// The extension as torch sees it, `torch.ops.fastattn_cuda.*`.
//
// An op is registered at the end of the file that has it. It writes to tensors that Python made
// (fastattn/ops/*/cuda.py), "Tensor(a!)" in its schema, and returns nothing; its fake implementation
// is that of all (fastattn/extension.py).
#include <device/tensor.cuh>  // quotes would find csrc/device in the emulator's build too

#include <string>

// setup.py and tests/emulator/library.py define FASTATTN_ARCHS, what FASTATTN_CUDA_ARCHS said, and
// FASTATTN_TOOLKIT, the version of CUDA as in CUDART_VERSION (0 for none).
namespace {

std::string built_for() { return FASTATTN_ARCHS; }
int64_t toolkit() { return FASTATTN_TOOLKIT; }

}  // namespace

STABLE_TORCH_LIBRARY(fastattn_cuda, m) {
  m.def("built_for() -> str");
  m.def("toolkit() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, CompositeExplicitAutograd, m) {
  m.impl("built_for", TORCH_BOX(&built_for));
  m.impl("toolkit", TORCH_BOX(&toolkit));
}
