// attention and its backward: the ops that library.cpp registers (fastattn/ops/attention/cuda.py
// allocates and calls).
//
// q, out, dout, dq (batch, seqlen_q, heads, width), k, v, dk, dv (batch, seqlen_k, kv_heads, width)
// with any strides but a last one of 1; lse and delta (batch, heads, seqlen_q) float32, contiguous.
// With cu_seqlens the batch is 1, and sequences lie one after another. bias and mask (boolean) have
// four dimensions, 1 where they are broadcast. `longest` is the length of the longest sequence.
#pragma once

#include <optional>

#include "device/tensor.cuh"

namespace fastattn {

void attention_forward(Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                       std::optional<Tensor> mask, std::optional<Tensor> bias,
                       std::optional<Tensor> alibi_slopes, std::optional<Tensor> sink,
                       std::optional<Tensor> key_lengths, std::optional<Tensor> cu_seqlens_q,
                       std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> seqused_q,
                       std::optional<Tensor> seqused_k, std::optional<Tensor> dropout_seed,
                       int64_t window_left, int64_t window_right, bool top_left,
                       double softmax_scale, double softcap, double dropout_p, int64_t threshold,
                       int64_t longest_q, int64_t longest_k);

// `delta` is scratch, like lse.
void attention_backward(Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor dout,
                        std::optional<Tensor> dlse, Tensor out, Tensor lse, Tensor q, Tensor k,
                        Tensor v, std::optional<Tensor> mask, std::optional<Tensor> bias,
                        std::optional<Tensor> alibi_slopes, std::optional<Tensor> key_lengths,
                        std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                        std::optional<Tensor> seqused_q, std::optional<Tensor> seqused_k,
                        std::optional<Tensor> dropout_seed, int64_t window_left,
                        int64_t window_right, bool top_left, double softmax_scale, double softcap,
                        double dropout_p, int64_t threshold, int64_t longest_q, int64_t longest_k);

}  // namespace fastattn
