// Writes new keys, turned by their positions if there are rotary tables, and values into a cache,
// of T or of 8-bit numbers.
//
// One block for a token of a sequence. What has no room in the cache is not written.
#pragma once

#include "attention/decode_cache.cuh"
#include "attention/decode_rotary.cuh"
#include "attention/decode_stored.cuh"

namespace fastattn {

constexpr int append_threads = 128;

template <class Element, class StoredElement>
struct AppendParams {
  using T = Element;
  using Stored = StoredElement;
  Global<Stored> k_cache, v_cache;
  Global<const T> k, v;  // (batch, appended, kv_heads, head_dim)
  int64_t k_batch, k_token, k_head;  // strides
  int64_t v_batch, v_token, v_head;
  CacheParams cache;
  Rotary<T> rotary;
  bool by_vectors;  // of k and v too
  Scale k_scale, v_scale;
};

// `width` columns of every head of a sequence.
template <class T, class Stored>
FA_DEVICE void copy_heads(Global<Stored> to, int64_t to_head, Global<const T> from,
                          int64_t from_head, int heads, int width, bool by_vectors,
                          const Scale& scales, int batch) {
  const int step = by_vectors ? 8 : 1;
  const int steps = width / step;
  for (int i = thread_index(); i < heads * steps; i += append_threads) {
    const int head = i / steps, column = (i - head * steps) * step;
    Global<const T> source = from + (head * from_head + column);
    Global<Stored> target = to + (head * to_head + column);
    float scale = 1.0f;
    if constexpr (!std::is_same_v<Stored, T>) scale = scales.at(batch, head);
    if (by_vectors) {
      const Vector<T, 8> given = load_vector<8>(source);
      Vector<Stored, 8> values;
      FA_UNROLL
      for (int e = 0; e < 8; ++e) values[e] = stored_as<Stored>(given[e], scale);
      store_vector(target, values);
    } else {
      store(target, stored_as<Stored>(load(source), scale));
    }
  }
}

template <class Params>
FA_KERNEL(append_threads, 4)
void append_kernel(FA_PARAMS(Params) p) {
  using T = typename Params::T;
  using Stored = typename Params::Stored;
  const CacheParams& cache = p.cache;
  const int token = block_x() % cache.appended;
  const int batch = block_x() / cache.appended;
  const int64_t before = cache.lengths[batch];
  const int64_t position = before < cache.capacity ? before + token : cache.capacity;
  if (position < 0 || position >= cache.capacity) return;
  const Place place = place_of(cache, batch, static_cast<int>(position));
  if (place.page < 0 || place.page >= cache.pages) return;

  Global<const T> k = p.k + (batch * p.k_batch + token * p.k_token);
  Global<const T> v = p.v + (batch * p.v_batch + token * p.v_token);
  Global<Stored> k_to = p.k_cache + (place.page * cache.k_page + place.slot * cache.k_key);
  Global<Stored> v_to = p.v_cache + (place.page * cache.v_page + place.slot * cache.v_key);
  if (p.rotary) {
    for (int i = thread_index(); i < cache.kv_heads * cache.head_dim; i += append_threads) {
      const int head = i / cache.head_dim, column = i - head * cache.head_dim;
      const float turned = rotated(k + head * p.k_head, column, p.rotary, position);
      float scale = 1.0f;
      if constexpr (!std::is_same_v<Stored, T>) scale = p.k_scale.at(batch, head);
      store(k_to + (head * cache.k_head + column),
            stored_as<Stored>(from_float<T>(turned), scale));
    }
  } else {
    copy_heads(k_to, cache.k_head, k, p.k_head, cache.kv_heads, cache.head_dim, p.by_vectors,
               p.k_scale, batch);
  }
  copy_heads(v_to, cache.v_head, v, p.v_head, cache.kv_heads, cache.head_dim_v, p.by_vectors,
             p.v_scale, batch);
}

}  // namespace fastattn
