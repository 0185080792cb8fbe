// The ops of ffn, as csrc/library.cpp registers them and fastattn/ops/ffn/cuda.py calls them.
//
// Matrices are torch's views of any strides, but for what a kernel writes, which is dense.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace fastattn::ffn {

using torch::stable::Tensor;

// out = activation(a b + bias), and pre = a b + bias if there is such a tensor: a (m, k), b (k, n),
// bias (n,), out and pre (m, n). `tile_rows` is 128 or 64; operands that are read by the element
// take 64.
void product(Tensor out, std::optional<Tensor> pre, Tensor a, Tensor b, std::optional<Tensor> bias,
             int64_t activation, int64_t tile_rows);

// out = (a b) activation'(pre), and activated = activation(pre), and sums = the column sums of out
// over every 32 rows (the last may be fewer), if there are such tensors: a (m, k), b (k, n), the
// others (m, n), sums (m / 32 rounded up, n) in float32.
void product_derivative(Tensor out, std::optional<Tensor> activated, std::optional<Tensor> sums,
                        Tensor a, Tensor b, Tensor pre, int64_t activation, int64_t tile_rows);

// sums[i] = the sum of the rows i rows_per_part to (i + 1) rows_per_part of the matrix.
void column_sums(Tensor sums, Tensor matrix, int64_t rows_per_part);

// The version of the cuBLASLt that torch carries; 0 if there is none.
int64_t cublaslt_version();

// `product` by cuBLASLt (cublaslt.cu), for "gelu_tanh", "relu" and no activation, `pre` for the
// first only. All rows are aligned to 16 bytes; no size is zero. False, and nothing is done, if
// cuBLASLt has no algorithm for such a product: it is asked once.
bool cublaslt_product(Tensor out, std::optional<Tensor> pre, Tensor workspace, Tensor a, Tensor b,
                      std::optional<Tensor> bias, int64_t activation);

// The same of `product_derivative`, for "gelu_tanh": out = (a b) activation'(pre), and
// bias_gradient (n,) = the sums of its columns, if there is such a tensor.
bool cublaslt_product_derivative(Tensor out, std::optional<Tensor> bias_gradient, Tensor workspace,
                                 Tensor a, Tensor b, Tensor pre);

}  // namespace fastattn::ffn
