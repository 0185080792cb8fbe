// Attention forward (FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 1): a block for each
// (query tile, head, batch).
//
//     for each key tile:  s = scores of q k^T (scores.cuh), to base 2
//                         m' = max(m, rowmax s);  p = 2^(s - m')
//                         l = l 2^(m - m') + rowsum p;  acc = acc 2^(m - m') + dropout(p) v
//     out = acc / l,  lse = (m + log2 l) ln 2
//
// The pipeline: a tile of keys and one of values are in shared memory, and each is refilled while
// the other one is multiplied with.
//
//     copies          V(n)          K(n+1)               V(n+1)
//     tensor cores    S = Q K(n)^T  acc += P V(n)        S = Q K(n+1)^T
//     other units                   softmax of S before
//
// P stays in registers: the accumulators of S, rounded, are the left operand of the second product.
// Key tiles that every row sees whole carry no arithmetic of positions.
#pragma once

#include "attention/dropout.cuh"
#include "attention/params.cuh"
#include "attention/scores.cuh"
#include "attention/tile.cuh"
#include "attention/traits.cuh"
#include "device/barrier.cuh"
#include "device/online_softmax.cuh"
#include "device/reduce.cuh"
#include "device/registers.cuh"

namespace fastattn {

template <class T>
struct ForwardParams : AttentionParams<T> {
  Matrix<T> out;
  Global<float> lse;
  Global<const T> sink;
  Global<const float> sink_float32;  // instead of `sink`
};

// The scores of a warp's rows after their products: scaled, hidden and so on if Full; else only
// hidden where the tile crosses an edge of the band.
template <class Traits, int MTiles, int NTiles, class T>
FA_DEVICE void score_rows(float (&s)[MTiles][NTiles][4], const ScoreRule<T>& rule, const Band& band,
                          int first_query, int first_key, bool crosses) {
  if (!Traits::full && !crosses) return;
  const int lane = renewed(lane_index());
  const int query = first_query + lane / 4, key = first_key + 2 * (lane % 4);
  FA_UNROLL
  for (int m = 0; m < MTiles; ++m) {
    FA_UNROLL
    for (int n = 0; n < NTiles; ++n) {
      FA_UNROLL
      for (int x = 0; x < 4; ++x) {
        const int i = query + 16 * m + 8 * (x / 2), j = key + 8 * n + x % 2;
        if constexpr (Traits::full) {
          s[m][n][x] = rule(s[m][n][x], i, j).value;
        } else {
          if (!band.sees(i, j)) s[m][n][x] = -infinity;
        }
      }
    }
  }
}

// Writes out and lse of a warp's rows, by way of a tile that other warps do not read. What it takes
// to find their place is computed again: the loop over the keys has no register to spare.
template <class Traits, int MTiles, int DTiles, class T>
FA_DEVICE void finish_rows(const ForwardParams<T>& p, const float (&acc)[MTiles][DTiles][4],
                           OnlineSoftmax (&state)[MTiles][2], Tile<T, 8 * DTiles> tile) {
  const Work work = find_work(renewed(block_x()), p.tiles, p.heads);
  const int head = work.head, batch = work.batch;
  const int tile_m = p.high < unbounded ? p.tiles - 1 - work.tile : work.tile;
  const Sequence sequence = find_sequence(p.cu_seqlens_q, p.seqused_q, batch, p.seqlen_q);
  const int first_row = tile_m * Traits::rows, own_row = warp_index() * 16 * MTiles;
  const int rows_left = sequence.length - first_row, lane = lane_index();
  const Global<float> lse =
      p.lse + (batch * p.lse_batch + head * p.lse_head + sequence.start + first_row);
  float factor[MTiles][2];
  FA_UNROLL
  for (int m = 0; m < MTiles; ++m) {
    FA_UNROLL
    for (int half = 0; half < 2; ++half) {
      OnlineSoftmax& row = state[m][half];
      row.sum = warp_sum<4>(row.sum);
      factor[m][half] = 1.0f;
      if (p.sink || p.sink_float32) {  // one more score, which has no value
        const float sink = p.sink ? to_float(load(p.sink + head)) : load(p.sink_float32 + head);
        factor[m][half] = row.raise(sink * log2_e);
        row.sum += exp2_fast(sink * log2_e - row.shift());
      }
      factor[m][half] *= row.inverse() * p.scores.inverse_keep;
      const int place = own_row + 16 * m + 8 * half + lane / 4;
      if (lane % 4 == 0 && place < rows_left) store(lse + place, row.lse());
    }
  }
  store_rows(acc, factor, tile, own_row, p.out.at(batch, sequence.start + first_row, head),
             p.out.token, rows_left, Traits::rows, p.head_dim_v, p.aligned);
}

// fma(s, scale, -shift) holds what the rounding of shift left out, which beyond this may be many
// powers of two: there the tile's highest score is subtracted before the scale.
constexpr float largest_shift = 16777216.0f;

template <class Traits>
FA_KERNEL(Traits::threads, Traits::blocks)
void forward_kernel(FA_PARAMS(ForwardParams<typename Traits::Type>) p) {
  using T = typename Traits::Type;
  using Places = Tile<T, Traits::head_dim>;
  constexpr int rows = Traits::rows, columns = Traits::columns, m_tiles = Traits::m_tiles;
  constexpr int n_tiles = columns / 8, d_tiles = Traits::head_dim / 8, steps = d_tiles / 2;

  const Work work = find_work(block_x(), p.tiles, p.heads);
  const int head = work.head, batch = work.batch;
  // Where queries see only keys on their left, the longest rows of tiles start first.
  const int tile = p.high < unbounded ? p.tiles - 1 - work.tile : work.tile;
  const int kv_head = head / p.group_size;
  const Band band = find_band(p, batch);
  const int first_row = tile * rows;
  const Sequence gap = find_gap(p.cu_seqlens_q, batch, p.sequences, band.q, int64_t{p.tiles} * rows,
                                p.seqlen_q);
  if (gap.length > 0) {
    clear_rows<rows, Traits::threads>(p.out, gap, head, tile, p.tiles, p.head_dim_v, p.aligned);
    for (int64_t row = int64_t{tile} * Traits::threads + thread_index(); row < gap.length;
         row += int64_t{p.tiles} * Traits::threads) {
      store(p.lse + (head * p.lse_head + gap.start + row), -infinity);
    }
  }
  if (first_row >= band.q.length) return;
  const int last_row = smaller(first_row + rows, band.q.length) - 1;
  const Range range = keys_for(band, first_row, last_row, columns);
  const int own_row = warp_index() * 16 * m_tiles;

  const Places q_tile{shared_memory<T>(Traits::q_bytes)};
  const Places k_tile{shared_memory<T>(Traits::k_bytes)};
  const Places v_tile{shared_memory<T>(Traits::v_bytes)};
  const Global<const T> keys = p.k.at(batch, band.k.start, kv_head);
  const Global<const T> values = p.v.at(batch, band.k.start, kv_head);
  const auto copy_keys = [&](int first) {
    load_rows<columns, Traits::threads>(
        k_tile, keys + first * p.k.token, p.k.token, p.head_dim, p.aligned,
        [&](int row) { return first + row < band.key_limit; });
    commit_copies();
  };
  const auto copy_values = [&](int first) {
    load_rows<columns, Traits::threads>(
        v_tile, values + first * p.v.token, p.v.token, p.head_dim_v, p.aligned,
        [&](int row) { return first + row < band.key_limit; });
    commit_copies();
  };
  load_rows<rows, Traits::threads>(
      q_tile, p.q.at(batch, band.q.start + first_row, head), p.q.token, p.head_dim, p.aligned,
      [&](int row) { return first_row + row < band.q.length; });
  commit_copies();
  if (range.start < range.end) copy_keys(range.start);

  const ScoreRule<T> rule(p.scores, band, batch, head);
  // Where scores are nothing but scaled products, the scale is one instruction with the subtraction
  // of the maximum.
  const float late_scale = Traits::full ? 1.0f : p.scores.scale;
  uint64_t seed = 0;
  if (Traits::full && p.scores.seed) seed = static_cast<uint64_t>(load(p.scores.seed));

  OnlineSoftmax state[m_tiles][2];
  float acc[m_tiles][d_tiles][4];
  clear(acc);
  RegisterLeft<m_tiles, Traits::q_in_registers ? steps : 1> q_kept;
  if constexpr (Traits::q_in_registers) {
    wait_copies<0>();
    sync_block();
    q_kept.fill(q_tile, own_row);
  }

  for (int first = range.start; first < range.end; first += columns) {
    wait_copies<0>();  // K of this tile
    sync_block();      // and nobody reads V of the last one any more
    copy_values(first);

    float s[m_tiles][n_tiles][4];
    clear(s);
    if constexpr (Traits::q_in_registers) {
      add_product_transposed<steps>(s, q_kept, k_tile);
    } else {
      add_product_transposed<steps>(s, SharedLeft<T, Traits::head_dim>{q_tile, own_row}, k_tile);
    }
    score_rows<Traits>(s, rule, band, first_row + own_row, first, range.crosses(first, columns));

    wait_copies<0>();  // V of this tile
    sync_block();      // and nobody reads K of it any more
    if (first + columns < range.end) copy_keys(first + columns);

    FA_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
      FA_UNROLL
      for (int half = 0; half < 2; ++half) {
        float highest = s[m][0][2 * half];
        FA_UNROLL
        for (int n = 0; n < n_tiles; ++n) {
          highest = max(highest, max(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        highest = warp_max<4>(highest);
        OnlineSoftmax& row = state[m][half];
        const float top = highest * late_scale;
        const float factor = row.raise(top);
        float shift = row.shift();
        if (!Traits::full && abs(shift) > largest_shift) {
          FA_UNROLL
          for (int n = 0; n < n_tiles; ++n) {
            s[m][n][2 * half] -= highest;
            s[m][n][2 * half + 1] -= highest;
          }
          shift = shift == top ? 0.0f : shift - top;
        }
        FA_UNROLL
        for (int n = 0; n < d_tiles; ++n) {
          acc[m][n][2 * half] *= factor;
          acc[m][n][2 * half + 1] *= factor;
        }
        float sum = 0.0f;
        FA_UNROLL
        for (int n = 0; n < n_tiles; ++n) {
          FA_UNROLL
          for (int x = 2 * half; x < 2 * half + 2; ++x) {
            s[m][n][x] = exp2_fast(fma(s[m][n][x], late_scale, -shift));
            sum += s[m][n][x];
          }
        }
        row.sum += sum;  // of this lane's columns; the lanes' sums meet at the end
      }
      if (Traits::full && p.scores.seed) {
        FA_UNROLL
        for (int n = 0; n < n_tiles; ++n) {
          const DropoutWords words =
              words_by_queries(seed, static_cast<uint32_t>(batch * p.heads + head),
                               first_row + own_row + 16 * m, first + 8 * n);
          FA_UNROLL
          for (int x = 0; x < 4; ++x) {
            if (!words.keeps(x, p.scores.threshold)) s[m][n][x] = 0.0f;
          }
        }
      }
    }
    add_product<columns / 16>(acc, as_left<T>(s), v_tile);
  }
  wait_copies<0>();
  if constexpr (!Traits::q_in_registers) {
    if (range.start >= range.end) sync_block();  // the tile of Q may be written once it has come
  }
  finish_rows<Traits>(p, acc, state, q_tile);
}

}  // namespace fastattn
