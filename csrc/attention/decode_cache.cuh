// Where a key of a sequence lies in a key-value cache, and how many keys there are.
//
// A cache is pages of `page_size` keys. Key j of sequence b lies in page table[b, j / page_size] at
// slot j % page_size (Kwon et al. 2023, arXiv:2309.06180); without a table a sequence has one page,
// its row of the cache. Contents that point outside of the cache are cut to it, in 64 bits, before
// anything is read there.
#pragma once

#include "attention/params.cuh"

namespace fastattn {

FA_DEVICE int larger(int a, int b) { return a > b ? a : b; }

struct CacheParams {
  Index lengths;      // (batch,) before the call
  Index block_table;  // (batch, table_width)
  Index rows;         // (batch,): the row of the cache that belongs to a sequence
  Index starts;       // (batch,): earlier keys are hidden
  int table_width;
  int64_t k_page, k_key, k_head;  // strides
  int64_t v_page, v_key, v_head;
  int capacity;  // keys that a sequence can have
  int appended;  // keys of the call, which `lengths` does not count
  int page_size;
  int pages;  // or rows
  int kv_heads;
  int head_dim, head_dim_v;
  bool by_vectors;  // rows of k and v can be read by 16 bytes
};

// Keys of a sequence, those of the call included.
FA_DEVICE int keys_held(const CacheParams& cache, int batch) {
  const int64_t before = cache.lengths[batch];
  const int64_t held = before < cache.capacity ? before + cache.appended : cache.capacity;
  return static_cast<int>(cut(held, 0, cache.capacity));
}

// Keys before this one are hidden.
FA_DEVICE int first_key_of(const CacheParams& cache, int batch, int length) {
  if (!cache.starts) return 0;
  return static_cast<int>(cut(cache.starts[batch], 0, length));
}

// Parts end where key tiles do.
constexpr int part_step = 128;

// How the keys of a sequence are cut: only by its own length, so that the bits of its result follow
// from nothing else.
struct Split {
  int most;  // parts of a sequence
  int keys;  // of a part, at least

  FA_DEVICE int part_length(int length) const {
    const int even = (length + most - 1) / most;
    return larger((even + part_step - 1) / part_step * part_step, keys);
  }
  FA_DEVICE int parts(int length) const {
    return length > 0 ? (length - 1) / part_length(length) + 1 : 1;
  }
};

struct Place {
  int64_t page;
  int slot;
};

// Of a key below the capacity. The page is what the table says, and may be none of the cache's.
FA_DEVICE Place place_of(const CacheParams& cache, int batch, int key) {
  if (cache.block_table) {
    const int page = key / cache.page_size;
    const int64_t entry = int64_t{batch} * cache.table_width + page;
    return {cache.block_table[entry], key - page * cache.page_size};
  }
  return {cache.rows ? cache.rows[batch] : int64_t{batch}, key};
}

// The nearest page of the cache.
FA_DEVICE int page_inside(const CacheParams& cache, int64_t page) {
  return static_cast<int>(cut(page, 0, cache.pages - 1));
}

}  // namespace fastattn
