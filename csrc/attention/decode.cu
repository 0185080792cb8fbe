// Attention on a key-value cache as ops (fastattn/ops/attention/cache/cuda.py calls them): the
// call's dtype.
#include "attention/decode_launch.cuh"

namespace fastattn {

extern template void decode_of<half_t, half_t>(const DecodeCall&);
extern template void decode_of<half_t, int8_t>(const DecodeCall&);
extern template void decode_of<half_t, e4m3_t>(const DecodeCall&);
extern template void decode_of<bfloat16_t, bfloat16_t>(const DecodeCall&);
extern template void decode_of<bfloat16_t, int8_t>(const DecodeCall&);
extern template void decode_of<bfloat16_t, e4m3_t>(const DecodeCall&);

namespace {

template <class T, class S>
struct Pair {
  using Element = T;
  using Stored = S;
};

// Calls run(Pair<T, Stored>{}) for the dtypes of x and of a cache.
template <class T, class Run>
void for_stored(const Tensor& cache, Run run) {
  if (cache.scalar_type() == ScalarType::Char) return run(Pair<T, int8_t>{});
  if (cache.scalar_type() == ScalarType::Byte) return run(Pair<T, e4m3_t>{});
  run(Pair<T, T>{});
}
template <class Run>
void for_dtypes(const Tensor& x, const Tensor& cache, Run run) {
  if (x.scalar_type() == ScalarType::Half) return for_stored<half_t>(cache, run);
  if (x.scalar_type() == ScalarType::BFloat16) return for_stored<bfloat16_t>(cache, run);
  throw std::runtime_error("fastattn: the CUDA kernels on a cache take float16 and bfloat16");
}

}  // namespace

// New keys, turned by `rotary_*` (positions, half), and values into the caches, after `lengths`.
// Caches of int8, or of float8_e4m3fn as uint8, have scales, (kv_heads,) or (batch, kv_heads).
void append_to_cache(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor lengths,
                     OptionalTensor block_table, OptionalTensor rows, OptionalTensor rotary_cos,
                     OptionalTensor rotary_sin, OptionalTensor k_scale, OptionalTensor v_scale,
                     bool rotary_interleaved, int64_t capacity) {
  for_dtypes(k, k_cache, [&](auto pair) {
    append_as<typename decltype(pair)::Element, typename decltype(pair)::Stored>(
        k_cache, v_cache, k, v, lengths, block_table, rows, rotary_cos, rotary_sin, k_scale,
        v_scale, rotary_interleaved, capacity);
  });
}

// Attention of q on the first lengths + appended keys, by `blocks` blocks. With `part_out` (most,
// batch, seqlen_q, heads, head_dim_v up to a multiple of 4) and `part_lse` (most, batch, seqlen_q,
// heads), both float32, in at most so many parts of `part_keys` keys or more, a multiple of 128,
// which are joined; without them in one.
void attend_to_cache(Tensor out, Tensor lse, OptionalTensor part_out, OptionalTensor part_lse,
                     Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths,
                     OptionalTensor block_table, OptionalTensor rows, OptionalTensor starts,
                     OptionalTensor alibi_slopes, OptionalTensor sink, OptionalTensor rotary_cos,
                     OptionalTensor rotary_sin, OptionalTensor k_scale, OptionalTensor v_scale,
                     bool rotary_interleaved, bool rotary_advances, int64_t capacity,
                     int64_t appended, int64_t part_keys, int64_t blocks, int64_t window_left,
                     int64_t window_right, double softmax_scale, double softcap) {
  const DecodeCall call{out,         lse,        part_out,     part_lse,
                        q,           k_cache,    v_cache,      lengths,
                        block_table, rows,       starts,       alibi_slopes,
                        sink,        rotary_cos, rotary_sin,   k_scale,
                        v_scale,     rotary_interleaved,       rotary_advances,
                        capacity,    appended,   part_keys,    blocks,
                        window_left, window_right, softmax_scale, softcap};
  for_dtypes(q, k_cache, [&](auto pair) {
    decode_of<typename decltype(pair)::Element, typename decltype(pair)::Stored>(call);
  });
}

}  // namespace fastattn

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn_cuda, m) {
  m.def(
      "append_to_cache(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths, "
      "Tensor? block_table, Tensor? rows, Tensor? rotary_cos, Tensor? rotary_sin, "
      "Tensor? k_scale, Tensor? v_scale, bool rotary_interleaved, int capacity) -> ()");
  m.def(
      "attend_to_cache(Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? part_out, Tensor(d!)? part_lse, "
      "Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table, Tensor? "
      "rows, "
      "Tensor? starts, Tensor? alibi_slopes, Tensor? sink, Tensor? rotary_cos, Tensor? rotary_sin, "
      "Tensor? k_scale, Tensor? v_scale, bool rotary_interleaved, bool rotary_advances, int capacity, int appended, "
      "int part_keys, int blocks, int window_left, int window_right, float softmax_scale, "
      "float softcap) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FA_DISPATCH_KEY, m) {
  m.impl("append_to_cache", TORCH_BOX(&fastattn::append_to_cache));
  m.impl("attend_to_cache", TORCH_BOX(&fastattn::attend_to_cache));
}
