// Launchers of attention on a key-value cache; fastattn/ops/attention/cuda calls them.
#pragma once

#include <optional>

#include "device/tensor.cuh"

namespace fastattn {

// New keys, turned by `rotary_*` (positions, half), and values into the caches, after `lengths`.
// Caches of int8, or of float8_e4m3fn as uint8, have scales, (kv_heads,) or (batch, kv_heads).
void append_to_cache(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor lengths,
                     std::optional<Tensor> block_table, std::optional<Tensor> rows,
                     std::optional<Tensor> rotary_cos, std::optional<Tensor> rotary_sin,
                     std::optional<Tensor> k_scale, std::optional<Tensor> v_scale,
                     bool rotary_interleaved, int64_t capacity);

// Attention of q on the first lengths + appended keys, by `blocks` blocks. With `part_out` (most,
// batch, seqlen_q, heads, head_dim_v up to a multiple of 4) and `part_lse` (most, batch, seqlen_q,
// heads), both float32, in at most so many parts of `part_keys` keys or more, a multiple of 128,
// which are joined; without them in one.
void attend_to_cache(Tensor out, Tensor lse, std::optional<Tensor> part_out,
                     std::optional<Tensor> part_lse, Tensor q, Tensor k_cache, Tensor v_cache,
                     Tensor lengths, std::optional<Tensor> block_table, std::optional<Tensor> rows,
                     std::optional<Tensor> starts, std::optional<Tensor> alibi_slopes,
                     std::optional<Tensor> sink, std::optional<Tensor> rotary_cos,
                     std::optional<Tensor> rotary_sin, std::optional<Tensor> k_scale,
                     std::optional<Tensor> v_scale, bool rotary_interleaved,
                     bool rotary_advances, int64_t capacity, int64_t appended,
                     int64_t part_keys, int64_t blocks, int64_t window_left, int64_t window_right,
                     double softmax_scale, double softcap);

}  // namespace fastattn
