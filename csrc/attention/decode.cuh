// Attention of a few queries on a long key-value cache, one part of the keys a block (Dao, Haziza,
// Massa and Sizov 2023, "Flash-Decoding for long-context inference").
//
// The time goes into reading keys and values, once each. So the query heads that share a key head
// are rows of one tile of 16, which mma.sync needs anyway, and each warp streams keys of its own:
//
//     block          one (sequence, part of its keys, key head, tile of rows) after another: there
//                    are as many blocks as the GPU keeps busy, whatever the cache has room for
//     warp w         key tiles w, w + warps, ... of the part, 16 keys each
//     ring of warp   K0 V0 K1 V1 ...: `slots` tiles, of which slots - 1 are under way by cp.async
//
//     s = log2(e) (softmax_scale q k^T, capped, minus ALiBi; -inf where hidden)
//     m' = max(m, rowmax s);  p = 2^(s - m');  l = l 2^(m - m') + rowsum p
//     acc = acc 2^(m - m') + p v
//
// (Milakov and Gimelshein 2018, arXiv:1805.02867.) A ring of 8-bit numbers has half the bytes; a
// warp widens the tile that it multiplies next to one of its own after the rings. No barrier of the block is inside the loop. At
// the end the warps' states are joined in shared memory, in their order, and merge.cuh joins parts.
#pragma once

#include "attention/decode_cache.cuh"
#include "attention/decode_rotary.cuh"
#include "attention/decode_stored.cuh"
#include "attention/tile.cuh"
#include "device/barrier.cuh"
#include "device/cp_async.cuh"
#include "device/online_softmax.cuh"
#include "device/reduce.cuh"

namespace fastattn {

constexpr int decode_rows = 16;  // of a tile: queries times the query heads of a key head
constexpr int decode_keys = 16;  // of a warp's step

template <class T, class Stored>
struct DecodeParams;

template <class Element, int HeadDim, class StoredElement>
struct DecodeTraits {
  using T = Element;
  using Stored = StoredElement;  // what the cache holds: T, int8_t or e4m3_t
  using Params = DecodeParams<T, Stored>;
  static constexpr bool widens = !std::is_same_v<Stored, T>;
  static constexpr int head_dim = HeadDim;  // of q, k and v with zeros after theirs
  static constexpr int warps = HeadDim <= 128 ? 4 : 2;
  static constexpr int threads = warps * warp_threads;
  static constexpr int slots = HeadDim <= 64 ? 5 : 3;   // odd: a key tile follows a key tile
  static constexpr int blocks = HeadDim <= 64 ? 4 : 3;  // that share an SM
  static constexpr int chunks = HeadDim / 8;            // of 16 bytes in a row
  static constexpr int tile_bytes = decode_keys * HeadDim * 2;
  static constexpr int slot_bytes = decode_keys * HeadDim * static_cast<int>(sizeof(Stored));
  static constexpr int ring_bytes = warps * slots * slot_bytes;
  static constexpr int widened_bytes = widens ? warps * tile_bytes : 0;
  // The warps' results, over the ring: sums with rows that lie 8 banks apart.
  static constexpr int sums_row = HeadDim + 8;
  static constexpr int state_bytes = warps * decode_rows * 4;
  static constexpr int sums_bytes = warps * decode_rows * sums_row * 4;
  static constexpr int shared_bytes = ring_bytes + widened_bytes;
  static_assert(slots % 2 == 1 && sums_bytes + 2 * state_bytes <= shared_bytes);
};

template <class T, class Stored>
struct DecodeParams {
  Global<T> out;           // (batch, seqlen_q, heads, head_dim_v), contiguous
  Global<float> lse;       // (batch, heads, seqlen_q), contiguous
  Global<float> part_out;  // (split.most, batch, seqlen_q, heads, part_width), if split.most > 1
  Global<float> part_lse;  // (split.most, batch, seqlen_q, heads)
  Global<const T> q;       // (batch, seqlen_q, heads, head_dim)
  Global<const Stored> k, v;  // the cache
  Scale k_scale, v_scale;     // of 8-bit numbers
  Global<const float> slopes;  // of ALiBi, (batch or 1, heads)
  Global<const float> sink;    // (heads,)
  int64_t q_batch, q_token, q_head, slopes_batch;  // strides
  CacheParams cache;
  Rotary<T> rotary;
  int batch, seqlen_q, heads, group, row_tiles;
  Split split;
  int part_width;                 // head_dim_v up to a multiple of 4
  int window_left, window_right;  // -1: no bound
  float scale;                    // softmax_scale log2(e), or softmax_scale / softcap
  float cap;                      // softcap log2(e), or 0
  bool q_by_vectors;
};

// A lane's view of one of its two rows of the tile: its query's place on the diagonal, the keys
// that it sees, from `low` to `high` - 1, and its head's slope times log2(e).
struct DecodeRow {
  int diagonal, low, high;
  float slope;
};

// One chunk of 8 columns of a row of q, turned, zeros where there is none.
template <class Params, class T>
FA_DEVICE Vector<T, 8> query_chunk(const Params& p, Global<const T> row, bool inside, int column,
                                   int64_t position) {
  Vector<T, 8> values;
  if (inside && p.q_by_vectors && !p.rotary && column < p.cache.head_dim) {
    return load_vector<8>(row + column);
  }
  FA_UNROLL
  for (int e = 0; e < 8; ++e) {
    float x = 0.0f;
    if (inside && column + e < p.cache.head_dim) {
      x = p.rotary ? rotated(row, column + e, p.rotary, position)
                   : to_float(load(row + (column + e)));
    }
    values[e] = from_float<T>(x);
  }
  return values;
}

// The offset of no key: negative, and aligned as others are, which a copy wants that reads nothing
// as well.
constexpr int64_t no_key = -16;

// Begins to copy a tile of keys or values. Lane l (and l + 16) has the offset of its key l, or
// no_key, which becomes zeros. Eight lanes copy 128 bytes of a row.
template <class Traits>
FA_DEVICE void copy_tile(Tile<typename Traits::T, Traits::head_dim> to,
                         Global<const typename Traits::T> from, int64_t offset, int width,
                         bool by_vectors) {
  using T = typename Traits::T;
  const int lower = static_cast<int>(offset), upper = static_cast<int>(offset >> 32);
  auto offset_of = [&](int row) {
    const auto low = static_cast<uint32_t>(shuffle(lower, row));
    return int64_t{shuffle(upper, row)} << 32 | low;
  };
  if (by_vectors) {
    FA_UNROLL
    for (int i = 0; i < decode_keys / 4; ++i) {
      const int row = lane_index() / 8 + 4 * i;
      const int64_t start = offset_of(row);
      FA_UNROLL
      for (int first = 0; first < Traits::chunks; first += 8) {
        const int chunk = lane_index() % 8 + first;
        copy_async(to.at(row, chunk), from + (start + 8 * chunk), start >= 0 && 8 * chunk < width);
      }
    }
  } else {
    FA_ROLL
    for (int i = 0; i < decode_keys * Traits::chunks / warp_threads; ++i) {
      const int place = i * warp_threads + lane_index();
      const int row = place / Traits::chunks, chunk = place % Traits::chunks;
      const int64_t start = offset_of(row);
      Vector<T, 8> values;
      FA_UNROLL
      for (int e = 0; e < 8; ++e) {
        const bool valid = start >= 0 && 8 * chunk + e < width;
        values[e] = valid ? load(from + (start + 8 * chunk + e)) : from_float<T>(0.0f);
      }
      store_vector(to.at(row, chunk), values);
    }
  }
}

// The same of 8-bit numbers, to rows one after another from `to` bytes of shared memory on.
template <class Traits>
FA_DEVICE void copy_stored(int to, Global<const typename Traits::Stored> from, int64_t offset,
                           int width, bool by_vectors) {
  using Stored = typename Traits::Stored;
  const int lower = static_cast<int>(offset), upper = static_cast<int>(offset >> 32);
  auto offset_of = [&](int row) {
    const auto low = static_cast<uint32_t>(shuffle(lower, row));
    return int64_t{shuffle(upper, row)} << 32 | low;
  };
  if (by_vectors) {
    constexpr int chunks = Traits::head_dim / 16;
    FA_UNROLL
    for (int i = 0; i < decode_keys * chunks / warp_threads; ++i) {
      const int place = i * warp_threads + lane_index();
      const int column = place % chunks * 16;
      const int64_t start = offset_of(place / chunks);
      copy_async(shared_memory<Stored>(to + 16 * place), from + (start + column),
                 start >= 0 && column < width);
    }
  } else {
    FA_ROLL
    for (int i = 0; i < decode_keys * Traits::head_dim / warp_threads; ++i) {
      const int place = i * warp_threads + lane_index();
      const int column = place % Traits::head_dim;
      const int64_t start = offset_of(place / Traits::head_dim);
      Stored value = {};
      if (start >= 0 && column < width) value = load(from + (start + column));
      store(shared_memory<Stored>(to + place), value);
    }
  }
}

// A tile of T from the bytes of such rows. Eight lanes read 64 bytes of two rows each, in different
// banks, which they write to the even chunks of one row and the odd ones of the other, and then the
// other way round.
template <class Traits>
FA_DEVICE void widen_tile(int to, int from) {
  using T = typename Traits::T;
  constexpr int D = Traits::head_dim, parts = D / 64;  // of a row, of 4 chunks of 16 numbers
  const int lane = renewed(lane_index()), row = lane / 4;
  FA_UNROLL
  for (int part = 0; part < parts; ++part) {
    const int chunk = (part + row) % parts * 4 + lane % 4;
    const int source = from + row * D + 16 * chunk;
    const int target = Tile<T, D>::offset(row, 2 * chunk);
    FA_UNROLL
    for (int lower = 0; lower < decode_keys; lower += 8) {  // rows of one place in the swizzle
      const auto bytes = load_vector<4>(shared_memory<const uint32_t>(source + lower * D));
      FA_UNROLL
      for (int half = 0; half < 2; ++half) {
        Vector<uint32_t, 4> pairs;
        FA_UNROLL
        for (int e = 0; e < 4; ++e) {
          pairs[e] =
              widened<T, typename Traits::Stored>(spread_bytes(bytes[2 * half + e / 2], e % 2));
        }
        const int place = (target ^ half * chunk_elements) + lower * D;
        store_vector(shared_memory<uint32_t>(to + 2 * place), pairs);
      }
    }
  }
}

// Finds the parts of all sequences, counted one sequence after another.
struct PartSearch {
  int sequence = 0;  // a multiple of 32
  int before = 0;    // parts of the sequences before it

  struct Part {
    int batch, number;  // of the sequence; batch is -1 past the last part
  };

  // Part `wanted` of the call, which must not be less than it was before. For whole warps.
  FA_DEVICE Part find(int wanted, const CacheParams& cache, const Split& split, int batch) {
    for (; sequence < batch; sequence += warp_threads) {
      const int own = sequence + lane_index();
      const int parts = own < batch ? split.parts(keys_held(cache, own)) : 0;
      int end = parts;  // of the parts up to this lane's sequence
      FA_UNROLL
      for (int step = 1; step < warp_threads; step *= 2) {
        const int lower = shuffle(end, larger(lane_index() - step, 0));
        if (lane_index() >= step) end += lower;
      }
      end += before;
      const int number = wanted - (end - parts);
      const bool mine = number >= 0 && number < parts;
      if (ballot(mine) != 0) return {warp_sum(mine ? own : 0), warp_sum(mine ? number : 0)};
      before = shuffle(end, warp_threads - 1);
    }
    return {-1, 0};
  }
};

// The results of one tile of rows for one part of the keys.
template <class Traits>
FA_DEVICE void decode_part(const typename Traits::Params& p, int batch, int split, int kv_head,
                           int row_tile) {
  using T = typename Traits::T;
  using Stored = typename Traits::Stored;
  constexpr int D = Traits::head_dim, warps = Traits::warps, slots = Traits::slots;
  const CacheParams& cache = p.cache;
  const int thread = thread_index(), warp = warp_index(), lane = lane_index();

  const int length = keys_held(cache, batch);
  const int part_length = p.split.part_length(length), split_start = split * part_length;
  const int rows = p.seqlen_q * p.group;
  const int first_row = row_tile * decode_rows;
  const int last_row = smaller(first_row + decode_rows, rows) - 1;
  const int shift = length - p.seqlen_q;
  const int first_key = first_key_of(cache, batch, length);
  int begin = larger(split_start, first_key);
  int end = smaller(length - split_start, part_length) + split_start;
  if (p.window_left >= 0) begin = larger(begin, first_row / p.group + shift - p.window_left);
  if (p.window_right >= 0) end = smaller(end, last_row / p.group + shift + p.window_right + 1);
  begin -= begin % decode_keys;
  const int tiles = end > begin ? (end - begin + decode_keys - 1) / decode_keys : 0;
  const int my_tiles = tiles > warp ? (tiles - warp + warps - 1) / warps : 0;

  // Where row r of the tile is: query r / group, query head kv_head * group + r % group. As a row
  // of the output, heads fastest.
  auto output_row = [&](int row) {
    const int query = row / p.group;
    const int head = kv_head * p.group + (row - query * p.group);
    return (int64_t{batch} * p.seqlen_q + query) * p.heads + head;
  };
  const int64_t outputs = int64_t{p.batch} * p.seqlen_q * p.heads;
  if (split > 0 && tiles == 0) {
    const int row = first_row + thread;
    if (row <= last_row && thread < decode_rows) {
      store(p.part_lse + (split * outputs + output_row(row)), -infinity);
    }
    return;
  }

  // --- the ring begins to fill
  auto slot_of = [&](int of_warp, int number) {
    return (of_warp * slots + number) * Traits::slot_bytes;
  };
  auto tile_at = [&](int bytes) { return Tile<T, D>{shared_memory<T>(bytes)}; };
  // The tile of T in a slot, or widened from it; for whole warps.
  auto tile_of = [&](int number) {
    if constexpr (!Traits::widens) return tile_at(slot_of(warp, number));
    const int own = Traits::ring_bytes + warp * Traits::tile_bytes;
    widen_tile<Traits>(own, slot_of(warp, number));
    sync_warp();
    return tile_at(own);
  };
  const Global<const Stored> k_head = p.k + kv_head * cache.k_head;
  const Global<const Stored> v_head = p.v + kv_head * cache.v_head;
  int64_t k_offset = no_key, v_offset = no_key;  // of this lane's key of the tile to be copied next
  auto find_keys = [&](int tile) {
    const int key = begin + (warp + tile * warps) * decode_keys + lane % decode_keys;
    k_offset = v_offset = no_key;
    if (tile < my_tiles && key >= first_key && key < end) {
      const Place place = place_of(cache, batch, key);
      const int64_t page = page_inside(cache, place.page);
      k_offset = page * cache.k_page + place.slot * cache.k_key;
      v_offset = page * cache.v_page + place.slot * cache.v_key;
    }
  };
  auto copy = [&](int to, Global<const Stored> from, int64_t offset, int width) {
    if constexpr (Traits::widens) {
      copy_stored<Traits>(slot_of(warp, to), from, offset, width, cache.by_vectors);
    } else {
      copy_tile<Traits>(tile_at(slot_of(warp, to)), from, offset, width, cache.by_vectors);
    }
    commit_copies();
  };
  auto copy_k = [&](int to) { copy(to, k_head, k_offset, cache.head_dim); };
  auto copy_v = [&](int to) { copy(to, v_head, v_offset, cache.head_dim_v); };
  FA_UNROLL
  for (int i = 0; i < slots / 2; ++i) {
    find_keys(i);
    copy_k(2 * i);
    copy_v(2 * i + 1);
  }
  find_keys(slots / 2);

  // --- q, through the last slot of warp 0, or its widened tile, which is still empty, into registers
  const Tile<T, D> q_tile = tile_at(Traits::widens ? Traits::ring_bytes : slot_of(0, slots - 1));
  for (int i = thread; i < decode_rows * Traits::chunks; i += Traits::threads) {
    const int local = i / Traits::chunks, chunk = i % Traits::chunks;
    const int row = first_row + local;
    const int query = row / p.group, head = kv_head * p.group + (row - query * p.group);
    const int position = larger(length - cache.appended, 0) + (p.rotary.advances ? query : 0);
    const Global<const T> from =
        p.q + (int64_t{batch} * p.q_batch + query * p.q_token + head * p.q_head);
    store_vector(q_tile.at(local, chunk),
                 query_chunk(p, from, row <= last_row, 8 * chunk, position));
  }
  sync_block();
  RegisterLeft<1, D / 16> q;
  q.fill(q_tile, 0);
  sync_block();

  DecodeRow row_of[2];
  OnlineSoftmax state[2];
  FA_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int row = smaller(first_row + lane / 4 + 8 * r, last_row);
    const int query = row / p.group, head = kv_head * p.group + (row - query * p.group);
    DecodeRow& here = row_of[r];
    here.diagonal = query + shift;
    here.low = first_key;
    here.high = end;
    if (p.window_left >= 0) here.low = larger(here.low, here.diagonal - p.window_left);
    if (p.window_right >= 0) here.high = smaller(here.high, here.diagonal + p.window_right + 1);
    here.slope = 0.0f;
    if (p.slopes) here.slope = load(p.slopes + (int64_t{batch} * p.slopes_batch + head)) * log2_e;
    if (p.sink && split == 0 && warp == 0) {  // a first score without a value
      state[r].maximum = load(p.sink + head) * log2_e;
      state[r].sum = lane % 4 == 0 ? 1.0f : 0.0f;
    }
  }

  float scale = p.scale;
  if constexpr (Traits::widens) scale *= p.k_scale.at(batch, kv_head);
  float acc[1][D / 8][4] = {};
  int full = 0, empty = slots - 1;  // slots to be read and to be filled next
  for (int n = 0; n < my_tiles; ++n) {
    const int tile_key = begin + (warp + n * warps) * decode_keys;
    wait_copies<slots - 2>();
    sync_warp();  // others' copies are there, and the slot read last is free
    copy_k(empty);
    empty = empty + 1 == slots ? 0 : empty + 1;

    float scores[1][2][4] = {};
    add_product_transposed<D / 16>(scores, q, tile_of(full));
    full = full + 1 == slots ? 0 : full + 1;

    // This lane's elements: half e / 4 of the keys, row e / 2 % 2, column e % 2.
    auto each = [&](auto change) {
      FA_UNROLL
      for (int e = 0; e < 8; ++e) {
        const int key = tile_key + e / 4 * 8 + lane % 4 * 2 + e % 2;
        change(scores[0][e / 4][e % 4], row_of[e / 2 % 2], key);
      }
    };
    each([&](float& s, const DecodeRow&, int) { s *= scale; });
    if (p.cap > 0.0f) each([&](float& s, const DecodeRow&, int) { s = tanh(s) * p.cap; });
    if (p.slopes) {
      each([&](float& s, const DecodeRow& row, int key) {
        s -= row.slope * abs(static_cast<float>(row.diagonal - key));
      });
    }
    each([&](float& s, const DecodeRow& row, int key) {
      if (key < row.low || key >= row.high) s = -infinity;
    });
    float factor[2];
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      float* s[2] = {scores[0][0] + 2 * r, scores[0][1] + 2 * r};
      factor[r] = state[r].raise(
          warp_max<4>(max(max(s[0][0], s[0][1]), max(s[1][0], s[1][1]))));
      const float shift_of_row = state[r].shift();
      FA_UNROLL
      for (int e = 0; e < 4; ++e) {
        float& score = s[e / 2][e % 2];
        score = exp2_fast(score - shift_of_row);
        state[r].sum += score;
      }
    }
    if (ballot(factor[0] != 1.0f || factor[1] != 1.0f) != 0) {
      FA_UNROLL
      for (int d = 0; d < D / 8; ++d) {
        FA_UNROLL
        for (int e = 0; e < 4; ++e) acc[0][d][e] *= factor[e / 2];
      }
    }
    wait_copies<slots - 2>();
    sync_warp();
    copy_v(empty);
    empty = empty + 1 == slots ? 0 : empty + 1;
    find_keys(n + 1 + slots / 2);  // long before they are needed: a table is read for them

    add_product<1>(acc, as_left<T>(scores), tile_of(full));
    full = full + 1 == slots ? 0 : full + 1;
  }

  // --- the warps' states over the ring, which is empty now
  wait_copies<0>();
  sync_block();
  const Shared<float> sums = shared_memory<float>(0);
  const Shared<float> maxima = shared_memory<float>(Traits::sums_bytes);
  const Shared<float> totals = shared_memory<float>(Traits::sums_bytes + Traits::state_bytes);
  FA_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int place = warp * decode_rows + lane / 4 + 8 * r;
    const float total = warp_sum<4>(state[r].sum);
    if (lane % 4 == 0) {
      store(maxima + place, state[r].maximum);
      store(totals + place, total);
    }
    FA_UNROLL
    for (int d = 0; d < D / 8; ++d) {
      const Vector<float, 2> pair = {{acc[0][d][2 * r], acc[0][d][2 * r + 1]}};
      store_vector(sums + (place * Traits::sums_row + 8 * d + lane % 4 * 2), pair);
    }
  }
  sync_block();

  constexpr int row_threads = Traits::threads / decode_rows;
  const int local = thread / row_threads;
  const int row = first_row + local;
  if (row > last_row) return;
  OnlineSoftmax whole;
  FA_UNROLL
  for (int w = 0; w < warps; ++w) whole.raise(load(maxima + (w * decode_rows + local)));
  float share[warps];
  FA_UNROLL
  for (int w = 0; w < warps; ++w) {
    const int place = w * decode_rows + local;
    share[w] = exp2_fast(load(maxima + place) - whole.shift());
    whole.sum += load(totals + place) * share[w];
  }
  float inverse = whole.inverse();
  if constexpr (Traits::widens) inverse *= p.v_scale.at(batch, kv_head);
  const bool is_whole = p.split.parts(length) == 1;
  const int64_t to = output_row(row);
  const int first_column = thread % row_threads * 4;
  for (int column = first_column; column < cache.head_dim_v; column += row_threads * 4) {
    Vector<float, 4> result = {};
    FA_UNROLL
    for (int w = 0; w < warps; ++w) {
      if (share[w] == 0.0f) continue;  // a warp that saw no key may hold 0 * NaN
      const auto part =
          load_vector<4>(sums + ((w * decode_rows + local) * Traits::sums_row + column));
      FA_UNROLL
      for (int e = 0; e < 4; ++e) result[e] = fma(part[e], share[w], result[e]);
    }
    FA_UNROLL
    for (int e = 0; e < 4; ++e) result[e] *= inverse;
    if (is_whole) {
      FA_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (column + e < cache.head_dim_v) {
          store(p.out + (to * cache.head_dim_v + column + e), from_float<T>(result[e]));
        }
      }
    } else {
      store_vector(p.part_out + ((split * outputs + to) * p.part_width + column), result);
    }
  }
  if (first_column == 0) {
    if (is_whole) {
      const int query = row / p.group, head = kv_head * p.group + (row - query * p.group);
      store(p.lse + ((int64_t{batch} * p.heads + head) * p.seqlen_q + query), whole.lse());
    } else {
      store(p.part_lse + (split * outputs + to), whole.lse());
    }
  }
}

template <class Traits>
FA_KERNEL(Traits::threads, Traits::blocks)
void decode_kernel(FA_PARAMS(typename Traits::Params) p) {
  // Tiles of rows share their keys in the L2, key heads their pages of DRAM.
  const int tiles = p.cache.kv_heads * p.row_tiles;
  PartSearch search;
  for (int item = block_x();; item += grid_x()) {
    const auto part = search.find(item / tiles, p.cache, p.split, p.batch);
    if (part.batch < 0) return;
    const int tile = item % tiles;
    decode_part<Traits>(p, part.batch, part.number, tile / p.row_tiles, tile % p.row_tiles);
    sync_block();  // shared memory is free again
  }
}

}  // namespace fastattn
