// layer_norm and rms_norm: the ops that library.cpp registers (fastattn/ops/layer_norm/cuda.py
// allocates and calls).
#pragma once

#include "device/tensor.cuh"

namespace fastattn {

// out, stream = norm(x + residual), x + residual. x and residual (rows, hidden) with contiguous
// rows, evenly spaced; out and stream contiguous; statistics float32, (2, rows) for layer_norm
// (`center`): rstd and mean, (1, rows) for rms_norm: rstd. No residual, no stream.
void layer_norm_forward(Tensor out, std::optional<Tensor> stream, Tensor statistics, Tensor x,
                        std::optional<Tensor> residual, std::optional<Tensor> weight,
                        std::optional<Tensor> bias, double eps, bool center);

// The gradients of x, and of residual where its dtype is another, and of weight and bias if wanted:
// then `partials` is float32 scratch, (wanted of these two, blocks, hidden), whose number of blocks
// decides the order of the sums over rows.
void layer_norm_backward(Tensor dx, std::optional<Tensor> dresidual, std::optional<Tensor> dweight,
                         std::optional<Tensor> dbias, std::optional<Tensor> partials, Tensor dout,
                         std::optional<Tensor> dstream, Tensor stream, std::optional<Tensor> weight,
                         Tensor statistics, bool center);

}  // namespace fastattn
