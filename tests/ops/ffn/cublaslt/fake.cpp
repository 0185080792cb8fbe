// A cuBLASLt for tests: takes what csrc/ffn/cublaslt.cu tells the real one, refuses what that one
// refuses, writes it down, and computes the product on the CPU by cuBLASLt's own, column-major
// definition.
//
// The numbers of attributes and epilogues stand here a second time, each as the documentation of
// cuBLAS lists it, without csrc/ffn/cublaslt.h and its bits.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace {

enum { ok = 0, invalid_value = 7, not_supported = 15 };

std::string calls;           // JSON objects, one a product
int fail_matmul = 0, heuristics = 0, alive = 0;
enum { works, finds_nothing, supports_nothing, fails } heuristic = works;
const char* complaint = "";  // why the last call was refused

struct Desc {
  int compute, scale, transpose_a = 0, transpose_b = 0;
  unsigned epilogue = 1;
  void* bias = nullptr;
  void* auxiliary = nullptr;
  long long auxiliary_ld = 0;
};
struct Layout {
  int type;
  unsigned long long rows, columns;
  long long ld;
};
struct Preference {
  unsigned long long workspace = 0;
  unsigned schemes = 7, alignment[4] = {256, 256, 256, 256};
};
struct Algorithm {
  uint64_t data[8];
};
struct Result {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

int refuse(const char* why, int status = invalid_value) {
  complaint = why;
  return status;
}

float number(const void* data, int type, long long at) {
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
  if (type == 2) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

void put(void* data, int type, long long at, float value) {
  auto* to = static_cast<uint16_t*>(data) + at;
  if (type == 2) {
    const _Float16 rounded = static_cast<_Float16>(value);
    std::memcpy(to, &rounded, 2);
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  *to = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float gelu(float x) {
  return 0.5f * x * (1.0f + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
}

float gelu_derivative(float x) {
  const float t = std::tanh(0.7978845608f * (x + 0.044715f * x * x * x));
  return 0.5f * (1.0f + t) +
         0.5f * x * (1.0f - t * t) * 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
}

// What is wrong with a product, or null.
const char* wrong(const Desc& d, const Layout& a, const Layout& b, const Layout& c) {
  const auto rows = d.transpose_a ? a.columns : a.rows, depth = d.transpose_a ? a.rows : a.columns;
  const auto columns = d.transpose_b ? b.rows : b.columns;
  if (d.compute != 68 || d.scale != 0) return "the types of the computation";
  if (a.type != c.type || b.type != c.type || (c.type != 2 && c.type != 14)) return "data types";
  if (rows != c.rows || columns != c.columns) return "the sizes of the result";
  if (depth != (d.transpose_b ? b.columns : b.rows)) return "the depth";
  for (const Layout* layout : {&a, &b, &c}) {
    if (layout->ld < static_cast<long long>(layout->rows)) return "a leading dimension";
  }
  const unsigned e = d.epilogue;
  const bool wants_bias = e == 4 || e == 6 || e == 36 || e == 164 || e == 208;
  const bool wants_auxiliary = e == 160 || e == 164 || e == 192 || e == 208;
  if (!wants_bias && !wants_auxiliary && e != 1 && e != 2 && e != 32) return "the epilogue";
  if (wants_bias != (d.bias != nullptr)) return "the bias";
  if (wants_auxiliary != (d.auxiliary != nullptr)) return "the auxiliary matrix";
  if (wants_auxiliary && (d.auxiliary_ld % 8 || d.auxiliary_ld < static_cast<long long>(c.rows))) {
    return "the auxiliary matrix' leading dimension";
  }
  return nullptr;
}

}  // namespace

extern "C" {

const char* fake_calls() {
  static std::string text;
  text = "[" + calls + "]";
  return text.c_str();
}
const char* fake_complaint() { return complaint; }
int fake_heuristics() { return heuristics; }
int fake_alive() { return alive; }
void fake_reset() { calls.clear(); }
void fake_fail(int matmul) { fail_matmul = matmul; }
void fake_heuristic(int number) { heuristic = static_cast<decltype(heuristic)>(number); }

size_t cublasLtGetVersion() { return 130101; }
const char* cublasLtGetStatusName(int status) {
  return status == invalid_value    ? "CUBLAS_STATUS_INVALID_VALUE"
         : status == not_supported ? "CUBLAS_STATUS_NOT_SUPPORTED"
                                   : "CUBLAS_STATUS_EXECUTION_FAILED";
}
int cublasLtCreate(void** handle) {
  *handle = &calls;
  return ok;
}

int cublasLtMatmulDescCreate(Desc** desc, int compute, int scale) {
  *desc = new Desc{compute, scale};
  ++alive;
  return ok;
}
int cublasLtMatmulDescDestroy(Desc* desc) {
  delete desc;
  --alive;
  return ok;
}
int cublasLtMatmulDescSetAttribute(Desc* desc, int attribute, const void* value, size_t bytes) {
  auto take = [&](auto& into) {
    if (bytes != sizeof into) return refuse("the size of a descriptor's attribute");
    std::memcpy(&into, value, bytes);
    return static_cast<int>(ok);
  };
  switch (attribute) {
    case 3: return take(desc->transpose_a);
    case 4: return take(desc->transpose_b);
    case 7: return take(desc->epilogue);
    case 8: return take(desc->bias);
    case 11: return take(desc->auxiliary);
    case 12: return take(desc->auxiliary_ld);
  }
  return refuse("an attribute of a descriptor");
}

int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns,
                               int64_t ld) {
  *layout = new Layout{type, rows, columns, ld};
  ++alive;
  return ok;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  --alive;
  return ok;
}

int cublasLtMatmulPreferenceCreate(Preference** preference) {
  *preference = new Preference;
  ++alive;
  return ok;
}
int cublasLtMatmulPreferenceDestroy(Preference* preference) {
  delete preference;
  --alive;
  return ok;
}
int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value,
                                         size_t bytes) {
  auto take = [&](auto& into) {
    if (bytes != sizeof into) return refuse("the size of a preference's attribute");
    std::memcpy(&into, value, bytes);
    return static_cast<int>(ok);
  };
  if (attribute == 1) return take(preference->workspace);
  if (attribute == 3) return take(preference->schemes);
  if (attribute >= 5 && attribute <= 8) return take(preference->alignment[attribute - 5]);
  return refuse("an attribute of a preference");
}

int cublasLtMatmulAlgoGetHeuristic(void* handle, Desc* desc, Layout* a, Layout* b, Layout* c,
                                   Layout* d, Preference* preference, int wanted, Result* results,
                                   int* found) {
  ++heuristics;
  if (handle != &calls || c != d || wanted != 1) return refuse("the heuristic's arguments");
  if (const char* what = wrong(*desc, *a, *b, *d)) return refuse(what);
  if (preference->schemes != 2) return refuse("the reduction scheme");
  for (const unsigned alignment : preference->alignment) {
    const bool power = (alignment & (alignment - 1)) == 0;
    if (alignment < 16 || alignment > 256 || !power) return refuse("an alignment");
  }
  if (heuristic == fails) return refuse("it fails");
  if (heuristic == supports_nothing) return refuse("it supports nothing", not_supported);
  *found = heuristic == finds_nothing ? 0 : 1;
  *results = {};
  results->algorithm.data[0] = d->rows;  // Matmul wants the algorithm of its own problem
  results->algorithm.data[7] = preference->workspace;
  return ok;
}

int cublasLtMatmul(void* handle, Desc* desc, const float* alpha, const void* a, Layout* a_layout,
                   const void* b, Layout* b_layout, const float* beta, const void* c,
                   Layout* c_layout, void* d, Layout* d_layout, const Algorithm* algorithm,
                   void* workspace, size_t workspace_bytes, void*) {
  if (fail_matmul) return fail_matmul;
  if (handle != &calls || *alpha != 1.0f || *beta != 0.0f || c != d || c_layout != d_layout) {
    return refuse("the product's arguments");
  }
  if (const char* what = wrong(*desc, *a_layout, *b_layout, *d_layout)) return refuse(what);
  if (algorithm->data[0] != d_layout->rows || algorithm->data[7] != workspace_bytes) {
    return refuse("the algorithm of another problem");
  }
  if (reinterpret_cast<uintptr_t>(workspace) % 16) return refuse("the workspace's alignment");

  const int type = d_layout->type;
  const unsigned e = desc->epilogue;
  const long long rows = static_cast<long long>(d_layout->rows);
  const long long depth =
      static_cast<long long>(desc->transpose_a ? a_layout->rows : a_layout->columns);
  std::vector<float> sums(static_cast<size_t>(rows));
  for (long long j = 0; j < static_cast<long long>(d_layout->columns); ++j) {
    for (long long i = 0; i < rows; ++i) {
      float x = 0.0f;
      for (long long k = 0; k < depth; ++k) {
        const long long in_a = desc->transpose_a ? k + i * a_layout->ld : i + k * a_layout->ld;
        const long long in_b = desc->transpose_b ? j + k * b_layout->ld : k + j * b_layout->ld;
        x += number(a, type, in_a) * number(b, type, in_b);
      }
      const long long auxiliary = i + j * desc->auxiliary_ld;
      if (e == 4 || e == 6 || e == 36 || e == 164) x += number(desc->bias, type, i);
      if (e == 160 || e == 164) put(desc->auxiliary, type, auxiliary, x);
      if (e == 2 || e == 6) x = std::fmax(x, 0.0f);
      if (e == 32 || e == 36 || e == 160 || e == 164) x = gelu(x);
      if (e == 192 || e == 208) x *= gelu_derivative(number(desc->auxiliary, type, auxiliary));
      sums[static_cast<size_t>(i)] += x;
      put(d, type, i + j * d_layout->ld, x);
    }
  }
  if (e == 208) {
    for (long long i = 0; i < rows; ++i) put(desc->bias, type, i, sums[static_cast<size_t>(i)]);
  }
  char text[256];
  std::snprintf(text, sizeof text,
                "{\"epilogue\": %u, \"rows\": %llu, \"columns\": %llu, \"depth\": %lld, "
                "\"transposed\": [%d, %d], \"ld\": [%lld, %lld, %lld]}",
                e, d_layout->rows, d_layout->columns, depth, desc->transpose_a, desc->transpose_b,
                static_cast<long long>(a_layout->ld), static_cast<long long>(b_layout->ld),
                static_cast<long long>(d_layout->ld));
  calls += (calls.empty() ? "" : ", ") + std::string(text);
  return ok;
}

}  // extern "C"
