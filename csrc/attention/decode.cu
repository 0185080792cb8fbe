// The ops of decode.h: the call's dtype.
#include "attention/decode_launch.cuh"

namespace fastattn {

extern template void decode_of<half_t>(const DecodeCall&);
extern template void decode_of<bfloat16_t>(const DecodeCall&);

namespace {

bool is_half(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Half) return true;
  if (x.scalar_type() == ScalarType::BFloat16) return false;
  throw std::runtime_error("fastattn: the CUDA kernels on a cache take float16 and bfloat16");
}

}  // namespace

void append_to_cache(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor lengths,
                     OptionalTensor block_table, OptionalTensor rows, OptionalTensor rotary_cos,
                     OptionalTensor rotary_sin, bool rotary_interleaved, int64_t capacity) {
  const auto append = is_half(k) ? append_as<half_t> : append_as<bfloat16_t>;
  append(k_cache, v_cache, k, v, lengths, block_table, rows, rotary_cos, rotary_sin,
         rotary_interleaved, capacity);
}

void attend_to_cache(Tensor out, Tensor lse, OptionalTensor part_out, OptionalTensor part_lse,
                     Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths,
                     OptionalTensor block_table, OptionalTensor rows, OptionalTensor starts,
                     OptionalTensor alibi_slopes, OptionalTensor sink, OptionalTensor rotary_cos,
                     OptionalTensor rotary_sin, bool rotary_interleaved, bool rotary_advances,
                     int64_t capacity, int64_t appended, int64_t part_keys,
                     int64_t blocks, int64_t window_left, int64_t window_right, double softmax_scale,
                     double softcap) {
  const DecodeCall call{out,          lse,           part_out,     part_lse,
                        q,            k_cache,       v_cache,      lengths,
                        block_table,  rows,          starts,       alibi_slopes,
                        sink,         rotary_cos,    rotary_sin,   rotary_interleaved,
                        rotary_advances, capacity,   appended,     part_keys,
                        blocks,       window_left,  window_right,  softmax_scale, softcap};
  const auto run = is_half(q) ? decode_of<half_t> : decode_of<bfloat16_t>;
  run(call);
}

}  // namespace fastattn
