// The products of ffn by cuBLASLt, with its own epilogues:
//
//     BIAS, RELU_BIAS, GELU_BIAS      activation(a b + bias)
//     GELU_AUX_BIAS                   and a b + bias
//     DGELU_BGRAD                     (a b) gelu'(auxiliary), and the sums of its columns
//
// and the same without a bias. Its GELU is the tanh form, fastattn's "gelu_tanh", and no other; the
// rows of GELU's auxiliary matrix must be multiples of 8 elements long. What its ReLU keeps for
// the backward is a mask of bits, and not `pre`, which every backend's backward can read; so
// RELU_AUX and DRELU are not used, and ReLU's derivative is product.cuh's.
//
// cuBLASLt's matrices are column-major: a row-major out (m, n) = a b is the column-major (n, m)
// product b^T a^T of the same memory, and the bias, along n, runs along its rows as it must.
#include "ffn/cublaslt.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "device/tensor.cuh"
#include "ffn/activation.cuh"

namespace fastattn::ffn {
namespace {

using namespace cublaslt;
using torch::headeronly::ScalarType;

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

// The library that torch has loaded, or what the linker finds by these names; null for none.
const Library* open() {
  void* file = nullptr;
  for (const int mode : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW}) {
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
      if (file == nullptr) file = dlopen(name, mode);
    }
  }
  if (file == nullptr) return nullptr;
  static Library found;
  const bool whole = find(file, "cublasLtGetVersion", found.GetVersion) &&
                     find(file, "cublasLtGetStatusName", found.GetStatusName) &&
                     find(file, "cublasLtCreate", found.Create) &&
                     find(file, "cublasLtMatmulDescCreate", found.MatmulDescCreate) &&
                     find(file, "cublasLtMatmulDescDestroy", found.MatmulDescDestroy) &&
                     find(file, "cublasLtMatmulDescSetAttribute", found.MatmulDescSetAttribute) &&
                     find(file, "cublasLtMatrixLayoutCreate", found.MatrixLayoutCreate) &&
                     find(file, "cublasLtMatrixLayoutDestroy", found.MatrixLayoutDestroy) &&
                     find(file, "cublasLtMatmulPreferenceCreate", found.MatmulPreferenceCreate) &&
                     find(file, "cublasLtMatmulPreferenceDestroy", found.MatmulPreferenceDestroy) &&
                     find(file, "cublasLtMatmulPreferenceSetAttribute",
                          found.MatmulPreferenceSetAttribute) &&
                     find(file, "cublasLtMatmulAlgoGetHeuristic", found.MatmulAlgoGetHeuristic) &&
                     find(file, "cublasLtMatmul", found.Matmul);
  return whole ? &found : nullptr;
}

const Library* library() {
  static const Library* const found = open();
  return found;
}

// A descriptor, destroyed with its scope.
struct Owned {
  void* it = nullptr;
  Status (*destroy)(void*);
  explicit Owned(Status (*how)(void*)) : destroy(how) {}
  ~Owned() {
    if (it != nullptr) destroy(it);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
};

// A row-major matrix as cuBLASLt sees its memory, and what makes of it the operand it wants.
struct Matrix {
  int64_t rows, columns, ld;
  Operation operation;

  // `along` is the dimension of the tensor that runs along the rows of the wanted operand.
  Matrix(const Tensor& tensor, int along) {
    const bool straight = tensor.stride(along) == 1 || tensor.size(along) == 1;
    const int fast = straight ? along : 1 - along;
    rows = tensor.size(fast);
    columns = tensor.size(1 - fast);
    ld = columns > 1 ? tensor.stride(1 - fast) : rows;  // the stride of one column may be anything
    operation = straight ? as_it_is : transposed;
  }
};

// The largest power of two that divides an address, up to 256, which cuBLASLt asks for at most.
uint32_t alignment(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer) | 256;
  return static_cast<uint32_t>(address & (~address + 1));
}

// cuBLASLt's name of an epilogue, after "CUBLASLT_EPILOGUE_".
std::string name_of(uint32_t bits) {
  if (bits == epilogue::plain) return "DEFAULT";
  std::string name;
  auto add = [&](bool there, const char* part) {
    if (there) name += std::string(name.empty() ? "" : "_") + part;
  };
  const bool derivative = (bits & epilogue::gelu_derivative) == epilogue::gelu_derivative;
  add(bits & epilogue::relu, "RELU");
  add(bits & epilogue::gelu, "GELU");
  add(derivative, "DGELU");
  add(bits & epilogue::auxiliary && !derivative, "AUX");
  add(bits & epilogue::bias, "BIAS");
  add(bits & epilogue::bias_gradient, "BGRAD");
  return name;
}

// Everything on which cuBLASLt's choice of an algorithm depends.
using Key = std::vector<int64_t>;

std::mutex mutex;
std::map<int, Handle> handles;  // by device
std::map<Key, std::optional<Algorithm>> algorithms;  // none where cuBLASLt has none

// out = epilogue(a b), of which `vector` is the bias or its gradient; false, and nothing is done, if
// cuBLASLt has no algorithm for it.
bool run(uint32_t epilogue, const Tensor& out, const std::optional<Tensor>& auxiliary,
         const std::optional<Tensor>& vector, const Tensor& workspace, const Tensor& a,
         const Tensor& b) {
  if (library() == nullptr) throw std::runtime_error("fastattn: there is no cuBLASLt");
  const Library& lt = *library();
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  const bool half = out.scalar_type() == ScalarType::Half;
  const DataType type = half ? float16 : bfloat16;
  auto check = [&](Status status, const char* what) {
    if (status == success) return;
    auto size = [](int64_t x, int64_t y) {
      return " (" + std::to_string(x) + ", " + std::to_string(y) + ")";
    };
    throw std::runtime_error("fastattn: cublasLt" + std::string(what) + ": " +
                             lt.GetStatusName(status) + ", for out" + size(m, n) + " = a" +
                             size(m, k) + " b" + size(k, n) + " in " +
                             (half ? "float16" : "bfloat16") + ", epilogue " + name_of(epilogue));
  };

  const OnDevice on(out);
  // The first operand has the rows of b^T, which run along n; the second the rows of a^T, along k.
  const Matrix first(b, 1), second(a, 1), result(out, 1);
  void* const result_data = out.data_ptr();
  void* const vector_data = vector ? vector->data_ptr() : nullptr;
  void* const auxiliary_data = auxiliary ? auxiliary->data_ptr() : nullptr;
  const int64_t auxiliary_ld = auxiliary ? Matrix(*auxiliary, 1).ld : 0;

  Owned desc(lt.MatmulDescDestroy);
  check(lt.MatmulDescCreate(&desc.it, compute_float32, float32), "MatmulDescCreate");
  auto describe = [&](DescAttribute attribute, auto value) {
    check(lt.MatmulDescSetAttribute(desc.it, attribute, &value, sizeof value),
          "MatmulDescSetAttribute");
  };
  describe(DescAttribute::transpose_a, first.operation);
  describe(DescAttribute::transpose_b, second.operation);
  describe(DescAttribute::epilogue, epilogue);
  if (vector) describe(DescAttribute::bias_pointer, vector_data);
  if (auxiliary) {
    describe(DescAttribute::auxiliary_pointer, auxiliary_data);
    describe(DescAttribute::auxiliary_ld, auxiliary_ld);
  }
  Owned first_layout(lt.MatrixLayoutDestroy), second_layout(lt.MatrixLayoutDestroy);
  Owned result_layout(lt.MatrixLayoutDestroy);
  auto lay_out = [&](Owned& layout, const Matrix& matrix) {
    check(lt.MatrixLayoutCreate(&layout.it, type, static_cast<uint64_t>(matrix.rows),
                                static_cast<uint64_t>(matrix.columns), matrix.ld),
          "MatrixLayoutCreate");
  };
  lay_out(first_layout, first);
  lay_out(second_layout, second);
  lay_out(result_layout, result);

  const auto workspace_bytes = static_cast<uint64_t>(workspace.numel());
  const uint32_t aligned[] = {alignment(b.data_ptr()), alignment(a.data_ptr()),
                              alignment(result_data)};
  const Key key{out.get_device_index(), type, epilogue, m, n, k, first.operation, second.operation,
                first.ld, second.ld, result.ld, auxiliary_ld, aligned[0], aligned[1], aligned[2],
                alignment(vector_data), alignment(auxiliary_data),
                static_cast<int64_t>(workspace_bytes)};
  Handle handle;
  std::optional<Algorithm> algorithm;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    Handle& of_device = handles[out.get_device_index()];
    if (of_device == nullptr) check(lt.Create(&of_device), "Create");
    handle = of_device;
    const auto known = algorithms.find(key);
    if (known != algorithms.end()) {
      algorithm = known->second;
    } else {
      Owned preference(lt.MatmulPreferenceDestroy);
      check(lt.MatmulPreferenceCreate(&preference.it), "MatmulPreferenceCreate");
      auto prefer = [&](PreferenceAttribute attribute, auto value) {
        check(lt.MatmulPreferenceSetAttribute(preference.it, attribute, &value, sizeof value),
              "MatmulPreferenceSetAttribute");
      };
      prefer(PreferenceAttribute::workspace_bytes, workspace_bytes);
      prefer(PreferenceAttribute::reduction_schemes, reduction_in_compute_type);
      prefer(PreferenceAttribute::alignment_a, aligned[0]);
      prefer(PreferenceAttribute::alignment_b, aligned[1]);
      prefer(PreferenceAttribute::alignment_c, aligned[2]);
      prefer(PreferenceAttribute::alignment_d, aligned[2]);
      HeuristicResult best{};
      int found = 0;
      Status status = lt.MatmulAlgoGetHeuristic(handle, desc.it, first_layout.it,
                                                second_layout.it, result_layout.it,
                                                result_layout.it, preference.it, 1, &best, &found);
      if (status == success) status = found == 0 ? not_supported : best.state;
      if (status != not_supported) {
        check(status, "MatmulAlgoGetHeuristic");
        algorithm = best.algorithm;
      }
      algorithms.emplace(key, algorithm);
    }
  }
  if (!algorithm) return false;

  const float one = 1.0f, zero = 0.0f;
  check(lt.Matmul(handle, desc.it, &one, b.data_ptr(), first_layout.it, a.data_ptr(),
                  second_layout.it, &zero, result_data, result_layout.it, result_data,
                  result_layout.it, &*algorithm, workspace.data_ptr(), workspace_bytes,
                  on.stream()),
        "Matmul");
  return true;
}

}  // namespace

// The version of the cuBLASLt that torch carries; 0 if there is none.
int64_t cublaslt_version() {
  return library() == nullptr ? 0 : static_cast<int64_t>(library()->GetVersion());
}

// `product` by cuBLASLt (cublaslt.cu), for "gelu_tanh", "relu" and no activation, `pre` for the
// first only. All rows are aligned to 16 bytes; no size is zero. False, and nothing is done, if
// cuBLASLt has no algorithm for such a product: it is asked once.
bool cublaslt_product(Tensor out, std::optional<Tensor> pre, Tensor workspace, Tensor a, Tensor b,
                      std::optional<Tensor> bias, int64_t activation) {
  uint32_t bits = 0;
  if (static_cast<Activation>(activation) == Activation::gelu_tanh) bits |= epilogue::gelu;
  if (static_cast<Activation>(activation) == Activation::relu) bits |= epilogue::relu;
  if (pre) bits |= epilogue::auxiliary;
  if (bias) bits |= epilogue::bias;
  return run(bits == 0 ? epilogue::plain : bits, out, pre, bias, workspace, a, b);
}

// The same of `product_derivative`, for "gelu_tanh": out = (a b) activation'(pre), and
// bias_gradient (n,) = the sums of its columns, if there is such a tensor.
bool cublaslt_product_derivative(Tensor out, std::optional<Tensor> bias_gradient, Tensor workspace,
                                 Tensor a, Tensor b, Tensor pre) {
  const uint32_t bits = bias_gradient ? epilogue::bias_gradient : 0;
  return run(epilogue::gelu_derivative | bits, out, pre, bias_gradient, workspace, a, b);
}

}  // namespace fastattn::ffn

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn_cuda, m) {
  m.def("ffn_cublaslt_version() -> int");
  m.def(
      "ffn_cublaslt_product(Tensor(a!) out, Tensor(b!)? pre, Tensor(c!) workspace, Tensor a, "
      "Tensor b, Tensor? bias, int activation) -> bool");
  m.def(
      "ffn_cublaslt_product_derivative(Tensor(a!) out, Tensor(b!)? bias_gradient, "
      "Tensor(c!) workspace, Tensor a, Tensor b, Tensor pre) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, CompositeExplicitAutograd, m) {
  m.impl("ffn_cublaslt_version", TORCH_BOX(&fastattn::ffn::cublaslt_version));
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FA_DISPATCH_KEY, m) {
  m.impl("ffn_cublaslt_product", TORCH_BOX(&fastattn::ffn::cublaslt_product));
  m.impl("ffn_cublaslt_product_derivative", TORCH_BOX(&fastattn::ffn::cublaslt_product_derivative));
}
