// The host's side of decode.cuh: tensors as the kernels' parameters, for one dtype and head_dim.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "attention/append.cuh"
#include "attention/decode.cuh"
#include "attention/launchers.cuh"
#include "attention/merge.cuh"

namespace fastattn {

// The arguments of attend_to_cache.
struct DecodeCall {
  const Tensor &out, &lse;
  const OptionalTensor &part_out, &part_lse;
  const Tensor &q, &k_cache, &v_cache, &lengths;
  const OptionalTensor &block_table, &rows, &starts, &alibi_slopes, &sink;
  const OptionalTensor &rotary_cos, &rotary_sin, &k_scale, &v_scale;
  bool rotary_interleaved, rotary_advances;
  int64_t capacity, appended, part_keys, blocks, window_left, window_right;
  double softmax_scale, softcap;
};

// Whether a cache is of 8-bit numbers: int8, or float8_e4m3fn, which comes as uint8.
inline bool holds_bytes(const Tensor& cache) {
  return cache.scalar_type() == ScalarType::Char || cache.scalar_type() == ScalarType::Byte;
}

inline Scale scale_params(const OptionalTensor& scale) {
  return {input<float>(scale), scale && scale->dim() == 2 ? scale->stride(0) : 0};
}

inline CacheParams cache_params(const Tensor& k, const Tensor& v, const Tensor& lengths,
                                const OptionalTensor& block_table, const OptionalTensor& rows,
                                int64_t capacity, int64_t appended) {
  CacheParams cache = {};
  cache.lengths = index(lengths);
  cache.block_table = index(block_table);
  cache.rows = index(rows);
  cache.starts = index(OptionalTensor());
  cache.table_width = block_table ? static_cast<int>(block_table->size(1)) : 0;
  cache.k_page = k.stride(0);
  cache.k_key = k.stride(1);
  cache.k_head = k.stride(2);
  cache.v_page = v.stride(0);
  cache.v_key = v.stride(1);
  cache.v_head = v.stride(2);
  cache.capacity = static_cast<int>(capacity);
  cache.appended = static_cast<int>(appended);
  cache.page_size = static_cast<int>(k.size(1));
  cache.pages = static_cast<int>(k.size(0));
  cache.kv_heads = static_cast<int>(k.size(2));
  cache.head_dim = static_cast<int>(k.size(3));
  cache.head_dim_v = static_cast<int>(v.size(3));
  cache.by_vectors = are_aligned({k, v}, holds_bytes(k) ? 16 : 8);
  if (k.size(2) * std::max(k.size(3), v.size(3)) >= int64_t{1} << 31) {
    throw std::runtime_error("fastattn: a token of the cache has 2^31 elements or more");
  }
  return cache;
}

template <class T>
Rotary<T> rotary_params(const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved,
                        bool advances) {
  const bool full = is_float32(cos);
  Rotary<T> rotary = {input<float>(only_if(full, cos)), input<float>(only_if(full, sin)),
                      input<T>(only_if(!full, cos)),    input<T>(only_if(!full, sin)),
                      0, 0, interleaved, advances};
  if (cos) {
    rotary.positions = cos->size(0);
    rotary.half = static_cast<int>(cos->size(1));
  }
  return rotary;
}

template <class T, class Stored>
void append_as(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
               const Tensor& lengths, const OptionalTensor& block_table,
               const OptionalTensor& rows, const OptionalTensor& rotary_cos,
               const OptionalTensor& rotary_sin, const OptionalTensor& k_scale,
               const OptionalTensor& v_scale, bool rotary_interleaved, int64_t capacity) {
  OnDevice device(k);
  AppendParams<T, Stored> p = {};
  p.k_cache = output<Stored>(k_cache);
  p.v_cache = output<Stored>(v_cache);
  p.k_scale = scale_params(k_scale);
  p.v_scale = scale_params(v_scale);
  p.k = input<T>(k);
  p.v = input<T>(v);
  p.k_batch = k.stride(0);
  p.k_token = k.stride(1);
  p.k_head = k.stride(2);
  p.v_batch = v.stride(0);
  p.v_token = v.stride(1);
  p.v_head = v.stride(2);
  p.cache = cache_params(k_cache, v_cache, lengths, block_table, rows, capacity, k.size(1));
  p.rotary = rotary_params<T>(rotary_cos, rotary_sin, rotary_interleaved, true);
  p.by_vectors = p.cache.by_vectors && are_aligned({k, v});
  const Grid grid{k.size(0) * k.size(1)};
  launch(append_kernel<AppendParams<T, Stored>>, "append", grid, append_threads, 0, device.stream(), p);
}

template <class T, int HeadDim, class Stored>
void decode_as(const DecodeCall& call) {
  using Traits = DecodeTraits<T, HeadDim, Stored>;
  const Tensor &q = call.q, &slopes = call.alibi_slopes ? *call.alibi_slopes : q;
  OnDevice device(q);
  DecodeParams<T, Stored> p = {};
  p.out = output<T>(call.out);
  p.lse = output<float>(call.lse);
  p.part_out = output<float>(call.part_out);
  p.part_lse = output<float>(call.part_lse);
  p.q = input<T>(q);
  p.k = input<Stored>(call.k_cache);
  p.v = input<Stored>(call.v_cache);
  p.k_scale = scale_params(call.k_scale);
  p.v_scale = scale_params(call.v_scale);
  p.slopes = input<float>(call.alibi_slopes);
  p.sink = input<float>(call.sink);
  p.q_batch = q.stride(0);
  p.q_token = q.stride(1);
  p.q_head = q.stride(2);
  p.slopes_batch = call.alibi_slopes && slopes.size(0) > 1 ? slopes.stride(0) : 0;
  p.cache = cache_params(call.k_cache, call.v_cache, call.lengths, call.block_table, call.rows,
                         call.capacity, call.appended);
  p.cache.starts = index(call.starts);
  p.rotary = rotary_params<T>(call.rotary_cos, call.rotary_sin, call.rotary_interleaved,
                              call.rotary_advances);
  p.batch = static_cast<int>(q.size(0));
  p.seqlen_q = static_cast<int>(q.size(1));
  p.heads = static_cast<int>(q.size(2));
  p.group = p.heads / p.cache.kv_heads;
  const int64_t rows = q.size(1) * p.group, row_tiles = (rows + decode_rows - 1) / decode_rows;
  p.row_tiles = static_cast<int>(row_tiles);
  p.split.most = call.part_out ? static_cast<int>(call.part_out->size(0)) : 1;
  p.split.keys = static_cast<int>(call.part_keys);
  p.part_width = call.part_out ? static_cast<int>(call.part_out->size(4)) : 0;
  p.window_left = static_cast<int>(call.window_left);
  p.window_right = static_cast<int>(call.window_right);
  const double softcap = held_softcap(call.softcap);
  p.scale = static_cast<float>(call.softmax_scale * (softcap > 0.0 ? 1.0 / softcap : log2_e));
  p.cap = static_cast<float>(softcap * log2_e);
  p.q_by_vectors = are_aligned({q});

  // The blocks count to one grid past the last part.
  constexpr int64_t bound = int64_t{1} << 30;
  if (q.size(0) * p.split.most * p.cache.kv_heads * row_tiles >= bound || rows >= bound ||
      call.blocks >= bound) {
    throw std::runtime_error("fastattn: decode has 2^30 parts or more: give fewer sequences");
  }
  launch(decode_kernel<Traits>, "decode", Grid{call.blocks}, Traits::threads, Traits::shared_bytes,
         device.stream(), p);
  if (p.split.most == 1) return;

  using Merging = MergeTraits<T, HeadDim>;
  MergeParams<T> m = {};
  m.out = p.out;
  m.lse = p.lse;
  m.part_out = input<float>(call.part_out);
  m.part_lse = input<float>(call.part_lse);
  m.cache = p.cache;
  m.batch = p.batch;
  m.seqlen_q = p.seqlen_q;
  m.heads = p.heads;
  m.split = p.split;
  m.part_width = p.part_width;
  launch(merge_kernel<Merging>, "merge", Grid{q.size(0) * q.size(1) * q.size(2)}, Merging::threads,
         Merging::shared_bytes, device.stream(), m);
}

// Instantiated in decode_half.cu and decode_bfloat16.cu, those of 8-bit numbers in their twins.
template <class T, class Stored>
void decode_of(const DecodeCall& call) {
  const int64_t k = call.q.size(3), v = call.v_cache.size(3), widest = k > v ? k : v;
  if (widest <= 64) {
    decode_as<T, 64, Stored>(call);
  } else if (widest <= 128) {
    decode_as<T, 128, Stored>(call);
  } else {
    decode_as<T, 256, Stored>(call);
  }
}

}  // namespace fastattn
