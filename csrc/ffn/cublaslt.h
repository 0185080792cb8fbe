// The part of cuBLASLt's interface that cublaslt.cu needs, which is found at run time: neither
// headers nor a library of cuBLAS are needed to build, and the process uses the one torch carries.
//
// Names and values are those of the cuBLAS documentation, "Using the cuBLASLt API"; they are part
// of its binary interface and the same in the versions 12 and 13.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn::cublaslt {

using Status = int;  // cublasStatus_t
constexpr Status success = 0, not_supported = 15;

enum DataType : int32_t { float32 = 0, float16 = 2, bfloat16 = 14 };  // cudaDataType_t
enum ComputeType : int32_t { compute_float32 = 68 };                  // cublasComputeType_t
enum Operation : int32_t { as_it_is = 0, transposed = 1 };            // cublasOperation_t

// cublasLtEpilogue_t, as the bits of which its values are made.
namespace epilogue {
constexpr uint32_t plain = 1;  // DEFAULT, where no other bit is
constexpr uint32_t relu = 2, bias = 4, bias_gradient = 16, gelu = 32;
constexpr uint32_t auxiliary = 128;
constexpr uint32_t gelu_derivative = 64 | auxiliary;
}  // namespace epilogue

// cublasLtMatmulDescAttributes_t
enum class DescAttribute : int {
  transpose_a = 3,         // int32_t
  transpose_b = 4,         // int32_t
  epilogue = 7,            // uint32_t
  bias_pointer = 8,        // void*, the bias or its gradient
  auxiliary_pointer = 11,  // void*
  auxiliary_ld = 12,       // int64_t, a multiple of 8 for GELU
};

// cublasLtMatmulPreferenceAttributes_t
enum class PreferenceAttribute : int {
  workspace_bytes = 1,   // uint64_t
  reduction_schemes = 3,  // uint32_t, a mask
  alignment_a = 5,       // uint32_t, in bytes, as the next three
  alignment_b = 6,
  alignment_c = 7,
  alignment_d = 8,
};

// cublasLtReductionScheme_t: partial sums of split products stay in the type of the computation.
constexpr uint32_t reduction_in_compute_type = 2;

struct Algorithm {  // cublasLtMatmulAlgo_t
  uint64_t data[8];
};
struct HeuristicResult {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

// cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t
using Handle = void*;
using Desc = void*;
using Layout = void*;
using Preference = void*;

// Of the functions with these names after "cublasLt".
struct Library {
  size_t (*GetVersion)();
  const char* (*GetStatusName)(Status);
  Status (*Create)(Handle*);
  Status (*MatmulDescCreate)(Desc*, ComputeType, DataType scale);
  Status (*MatmulDescDestroy)(Desc);
  Status (*MatmulDescSetAttribute)(Desc, DescAttribute, const void*, size_t);
  Status (*MatrixLayoutCreate)(Layout*, DataType, uint64_t rows, uint64_t columns, int64_t ld);
  Status (*MatrixLayoutDestroy)(Layout);
  Status (*MatmulPreferenceCreate)(Preference*);
  Status (*MatmulPreferenceDestroy)(Preference);
  Status (*MatmulPreferenceSetAttribute)(Preference, PreferenceAttribute, const void*, size_t);
  Status (*MatmulAlgoGetHeuristic)(Handle, Desc, Layout a, Layout b, Layout c, Layout d, Preference,
                                   int wanted, HeuristicResult*, int* found);
  Status (*Matmul)(Handle, Desc, const void* alpha, const void* a, Layout, const void* b, Layout,
                   const void* beta, const void* c, Layout, void* d, Layout, const Algorithm*,
                   void* workspace, size_t workspace_bytes, void* stream);
};

}  // namespace fastattn::cublaslt
