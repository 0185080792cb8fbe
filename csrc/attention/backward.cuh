// Attention backward without atomics (FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2, in
// two loops): each output is written by one block, so that every run gives the same bits.
//
// With s the scores of scores.cuh, p = exp(s - lse) computed again, and D dropout's factor (0 or
// 1 / (1 - dropout_p)) of each weight,
//
//     delta = rowsum(dO * out) - dlse                                            (delta_kernel)
//     dV = (D p)^T dO,   dS = p * (D dO v^T - delta) * softcap's derivative
//     dK = softmax_scale dS^T q          (keys_kernel: by key tile, over its queries and heads)
//     dQ = softmax_scale dS k            (queries_kernel: by query tile, over its keys)
//
// dlse joins delta because dlse/ds = p. keys_kernel computes s and dP transposed, keys by queries,
// so that p and dS are left operands in the registers where they arise, in both kernels.
#pragma once

#include "attention/dropout.cuh"
#include "attention/params.cuh"
#include "attention/scores.cuh"
#include "attention/tile.cuh"
#include "attention/traits.cuh"
#include "device/barrier.cuh"
#include "device/reduce.cuh"
#include "device/registers.cuh"

namespace fastattn {

template <class T>
struct BackwardParams : AttentionParams<T> {
  Matrix<const T> dout;
  Matrix<T> dq, dk, dv;
  Global<const float> lse;
  Global<float> delta;  // read, but for delta_kernel; with the strides of lse
  float softmax_scale;
};

template <class T>
struct DeltaParams {
  Matrix<const T> dout, out;
  Global<const float> dlse;  // (batch, heads, seqlen_q), contiguous, or none
  Global<float> delta;       // likewise
  int heads, seqlen_q, head_dim_v;
  int64_t rows;
  bool aligned;
};

constexpr int delta_threads = 128;
constexpr int delta_lanes = 8;  // of one row
constexpr int delta_rows = delta_threads / delta_lanes;

template <class T>
FA_KERNEL(delta_threads, 8)
void delta_kernel(FA_PARAMS(DeltaParams<T>) p) {
  const int64_t line =
      static_cast<int64_t>(block_x()) * delta_rows + thread_index() / delta_lanes;
  const bool inside = line < p.rows;
  const int64_t token = line % p.seqlen_q, batch_head = line / p.seqlen_q;
  const int64_t head = batch_head % p.heads, batch = batch_head / p.heads;
  float sum = 0.0f;
  if (inside) {
    const Global<const T> dout = p.dout.at(batch, token, head), out = p.out.at(batch, token, head);
    for (int c = lane_index() % delta_lanes * chunk_elements; c < p.head_dim_v;
         c += delta_lanes * chunk_elements) {
      if (p.aligned) {
        const auto a = load_vector<chunk_elements>(dout + c);
        const auto b = load_vector<chunk_elements>(out + c);
        FA_UNROLL
        for (int e = 0; e < chunk_elements; ++e) sum = fma(to_float(a[e]), to_float(b[e]), sum);
      } else {
        for (int e = c; e < c + chunk_elements && e < p.head_dim_v; ++e) {
          sum = fma(to_float(load(dout + e)), to_float(load(out + e)), sum);
        }
      }
    }
  }
  sum = warp_sum<delta_lanes>(sum);
  if (inside && lane_index() % delta_lanes == 0) {
    store(p.delta + line, p.dlse ? sum - load(p.dlse + line) : sum);
  }
}

// A row's share of its scores' gradient. Rows after the end, and those that see no key, whose
// LSE is -inf, get p = 0 from an LSE of inf; what arrives as the latter's gradient may be anything.
struct RowState {
  float lse;  // to base 2
  float delta;
};

template <class T>
FA_DEVICE RowState row_state(const BackwardParams<T>& p, int64_t line, bool inside) {
  const float lse = inside ? load(p.lse + line) : -infinity;
  if (lse == -infinity) return {infinity, 0.0f};
  return {lse * log2_e, load(p.delta + line)};
}

// p and dS of one score, from its products q.k and dO.v.
struct Gradient {
  float p, ds;
};

template <class Traits, class T>
FA_DEVICE Gradient score_gradient(const BackwardParams<T>& p, const ScoreRule<T>& rule,
                                  const Band& band, bool crosses, float product, float dp,
                                  RowState row, bool kept, int i, int j) {
  if constexpr (Traits::full) {
    const Score score = rule(product, i, j);
    const float weight = exp2_fast(score.value - row.lse);
    const float factor = kept ? p.scores.inverse_keep : 0.0f;
    return {weight * factor, weight * (dp * factor - row.delta) * score.cap_slope};
  } else {
    float weight = exp2_fast(fma(product, p.scores.scale, -row.lse));
    if (crosses && !band.sees(i, j)) weight = 0.0f;
    return {weight, weight * (dp - row.delta)};
  }
}

// Which of 4 N weights of an accumulator's row of tiles dropout keeps: bit 4 n + x for d[n][x].
template <int N, class Words>
FA_DEVICE uint32_t kept_weights(int threshold, const Words& words) {
  static_assert(4 * N <= 32);
  uint32_t kept = 0;
  FA_UNROLL
  for (int n = 0; n < N; ++n) {
    const DropoutWords its = words(n);
    FA_UNROLL
    for (int x = 0; x < 4; ++x) {
      kept |= static_cast<uint32_t>(its.keeps(x, threshold)) << (4 * n + x);
    }
  }
  return kept;
}

// Writes a warp's rows of dK or dV, by way of a tile that other warps do not read. What it takes to
// find their place is computed again: the loop over the queries has no register to spare.
template <class Traits, int MTiles, int DTiles, class T>
FA_DEVICE void finish_keys(const BackwardParams<T>& p, const Matrix<T>& to,
                           const float (&d)[MTiles][DTiles][4], float scale,
                           Tile<T, 8 * DTiles> tile, int width) {
  const Work work = find_work(renewed(block_x()), p.tiles, p.heads / p.group_size);
  const Band band = find_band(p, work.batch);
  const int first_key = work.tile * Traits::rows, own_row = warp_index() * 16 * MTiles;
  float factor[MTiles][2];
  FA_UNROLL
  for (int m = 0; m < MTiles; ++m) factor[m][0] = factor[m][1] = scale;
  // Rows of padding keys hold nothing of meaning: their gradient is zero.
  store_rows(d, factor, tile, own_row, to.at(work.batch, band.k.start + first_key, work.head),
             to.token, band.k.length - first_key, band.key_limit - first_key, width, p.aligned);
}

template <class Traits>
FA_KERNEL(Traits::threads, Traits::blocks)
void keys_kernel(FA_PARAMS(BackwardParams<typename Traits::Type>) p) {
  using T = typename Traits::Type;
  using Places = Tile<T, Traits::head_dim>;
  constexpr int rows = Traits::rows, columns = Traits::columns, m_tiles = Traits::m_tiles;
  constexpr int n_tiles = columns / 8, d_tiles = Traits::head_dim / 8, steps = d_tiles / 2;

  const Work work = find_work(block_x(), p.tiles, p.heads / p.group_size);
  const int kv_head = work.head, batch = work.batch;
  const Band band = find_band(p, batch);
  const int first_key = work.tile * rows;
  const Sequence gap = find_gap(p.cu_seqlens_k, batch, p.sequences, band.k, int64_t{p.tiles} * rows,
                                p.seqlen_k);
  if (gap.length > 0) {
    if constexpr (Traits::dk) {
      clear_rows<rows, Traits::threads>(p.dk, gap, kv_head, work.tile, p.tiles, p.head_dim,
                                        p.aligned);
    }
    if constexpr (Traits::dv) {
      clear_rows<rows, Traits::threads>(p.dv, gap, kv_head, work.tile, p.tiles, p.head_dim_v,
                                        p.aligned);
    }
  }
  if (first_key >= band.k.length) return;
  const Range range = queries_for(band, first_key, first_key + rows - 1, columns);
  const int own_row = warp_index() * 16 * m_tiles;

  const Places k_tile{shared_memory<T>(Traits::k_bytes)};
  const Places v_tile{shared_memory<T>(Traits::v_bytes)};
  const auto q_stage = [&](int stage) {
    return Places{shared_memory<T>(Traits::stages_bytes + stage * Traits::stage_bytes)};
  };
  const auto dout_stage = [&](int stage) {
    return Places{shared_memory<T>(Traits::stages_bytes + stage * Traits::stage_bytes +
                                   Traits::stage_bytes / 2)};
  };
  const auto lse_stage = [&](int stage) {
    return shared_memory<float>(Traits::state_bytes) + stage * 2 * columns;
  };
  const auto exists = [&](int row) { return first_key + row < band.key_limit; };
  const int64_t token = band.k.start + first_key;
  load_rows<rows, Traits::threads>(k_tile, p.k.at(batch, token, kv_head), p.k.token, p.head_dim,
                                   p.aligned, exists);
  if constexpr (Traits::dk) {
    load_rows<rows, Traits::threads>(v_tile, p.v.at(batch, token, kv_head), p.v.token,
                                     p.head_dim_v, p.aligned, exists);
  }
  commit_copies();

  // The tiles of all query heads of the group are one sequence of `head` and `first`.
  const auto line_of = [&](int head) {
    return batch * p.lse_batch + head * p.lse_head + band.q.start;
  };
  const auto copy_tile = [&](int head, int first, int stage) {
    const int64_t query = band.q.start + first, line = line_of(head) + first;
    const int left = band.q.length - first;
    load_rows<columns, Traits::threads>(q_stage(stage), p.q.at(batch, query, head), p.q.token,
                                        p.head_dim, p.aligned,
                                        [&](int row) { return row < left; });
    // Rows that see no key occur only where something hides keys.
    const bool hides = Traits::full || range.crosses(first, columns);
    load_rows<columns, Traits::threads>(
        dout_stage(stage), p.dout.at(batch, query, head), p.dout.token, p.head_dim_v, p.aligned,
        [&](int row) {
          return row < left && (!hides || load(p.lse + (line + row)) != -infinity);
        });
    commit_copies();
  };
  const auto own_state = [&](int head, int first) {
    const int row = first + thread_index();
    return row_state(p, line_of(head) + row, row < band.q.length);
  };
  const auto keep_state = [&](RowState state, int stage) {
    store(lse_stage(stage) + thread_index(), state.lse);
    store(lse_stage(stage) + (columns + thread_index()), state.delta);
  };
  const bool has_state = thread_index() < columns;

  uint64_t seed = 0;
  if (Traits::full && p.scores.seed) seed = static_cast<uint64_t>(load(p.scores.seed));
  float dk[Traits::dk ? m_tiles : 1][Traits::dk ? d_tiles : 1][4];
  float dv[Traits::dv ? m_tiles : 1][Traits::dv ? d_tiles : 1][4];
  clear(dk);
  clear(dv);

  const int last_head = (kv_head + 1) * p.group_size - 1;
  int head = kv_head * p.group_size, first = range.start;
  bool more = range.start < range.end;
  if (more) {
    copy_tile(head, first, 0);
    if (has_state) keep_state(own_state(head, first), 0);
  }
  for (int stage = 0; more; stage ^= 1) {
    wait_copies<0>();  // this tile
    sync_block();      // and nobody reads the last one any more
    const int its_head = head, its_first = first;
    first += columns;
    if (first >= range.end) {
      first = range.start;
      ++head;
    }
    more = head <= last_head;
    RowState next{};
    if (more) {
      copy_tile(head, first, stage ^ 1);
      if (has_state) next = own_state(head, first);
    }

    float s[m_tiles][n_tiles][4], dp[m_tiles][n_tiles][4];
    clear(s);
    clear(dp);
    const Places q_tile = q_stage(stage), dout_tile = dout_stage(stage);
    add_product_transposed<steps>(s, SharedLeft<T, Traits::head_dim>(k_tile, own_row), q_tile);
    if constexpr (Traits::dk) {
      add_product_transposed<steps>(dp, SharedLeft<T, Traits::head_dim>(v_tile, own_row),
                                    dout_tile);
    }
    const ScoreRule<T> rule(p.scores, band, batch, its_head);
    const bool crosses = range.crosses(its_first, columns);
    const int lane = renewed(lane_index());
    FA_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
      const int key = first_key + own_row + 16 * m;
      uint32_t kept = all_lanes;
      if (Traits::full && p.scores.seed) {
        kept = kept_weights<n_tiles>(p.scores.threshold, [&](int n) {
          return words_by_keys(seed, static_cast<uint32_t>(batch * p.heads + its_head), key,
                               its_first + 8 * n);
        });
      }
      FA_UNROLL
      for (int n = 0; n < n_tiles; ++n) {
        const int column = 8 * n + 2 * (lane % 4);
        const auto lse = load_vector<2>(lse_stage(stage) + column);
        const auto delta = load_vector<2>(lse_stage(stage) + (columns + column));
        FA_UNROLL
        for (int x = 0; x < 4; ++x) {
          const Gradient gradient = score_gradient<Traits>(
              p, rule, band, crosses, s[m][n][x], dp[m][n][x], {lse[x % 2], delta[x % 2]},
              (kept >> (4 * n + x)) & 1, its_first + column + x % 2, key + lane / 4 + 8 * (x / 2));
          s[m][n][x] = gradient.p;
          dp[m][n][x] = gradient.ds;
        }
      }
    }
    if constexpr (Traits::dv) add_product<columns / 16>(dv, as_left<T>(s), dout_tile);
    if constexpr (Traits::dk) add_product<columns / 16>(dk, as_left<T>(dp), q_tile);
    if (more && has_state) keep_state(next, stage ^ 1);
  }
  wait_copies<0>();
  sync_block();  // the tile of K may be written
  if constexpr (Traits::dk) {
    finish_keys<Traits>(p, p.dk, dk, p.softmax_scale, k_tile, p.head_dim);
  }
  if constexpr (Traits::dv) finish_keys<Traits>(p, p.dv, dv, 1.0f, k_tile, p.head_dim_v);
}

template <class Traits>
FA_KERNEL(Traits::threads, Traits::blocks)
void queries_kernel(FA_PARAMS(BackwardParams<typename Traits::Type>) p) {
  using T = typename Traits::Type;
  using Places = Tile<T, Traits::head_dim>;
  constexpr int rows = Traits::rows, columns = Traits::columns, m_tiles = Traits::m_tiles;
  constexpr int n_tiles = columns / 8, d_tiles = Traits::head_dim / 8, steps = d_tiles / 2;

  const Work work = find_work(block_x(), p.tiles, p.heads);
  const int head = work.head, batch = work.batch, kv_head = head / p.group_size;
  const int tile = p.high < unbounded ? p.tiles - 1 - work.tile : work.tile;  // longest first
  const Band band = find_band(p, batch);
  const int first_row = tile * rows;
  const Sequence gap = find_gap(p.cu_seqlens_q, batch, p.sequences, band.q, int64_t{p.tiles} * rows,
                                p.seqlen_q);
  if (gap.length > 0) {
    clear_rows<rows, Traits::threads>(p.dq, gap, head, tile, p.tiles, p.head_dim, p.aligned);
  }
  if (first_row >= band.q.length) return;
  const int last_row = smaller(first_row + rows, band.q.length) - 1;
  const Range range = keys_for(band, first_row, last_row, columns);
  const int own_row = warp_index() * 16 * m_tiles, lane = lane_index();

  const Places q_tile{shared_memory<T>(Traits::q_bytes)};
  const Places dout_tile{shared_memory<T>(Traits::dout_bytes)};
  const auto k_stage = [&](int stage) {
    return Places{shared_memory<T>(Traits::stages_bytes + stage * Traits::stage_bytes)};
  };
  const auto v_stage = [&](int stage) {
    return Places{shared_memory<T>(Traits::stages_bytes + stage * Traits::stage_bytes +
                                   Traits::stage_bytes / 2)};
  };
  const auto copy_tile = [&](int first, int stage) {
    const auto exists = [&](int row) { return first + row < band.key_limit; };
    const int64_t token = band.k.start + first;
    load_rows<columns, Traits::threads>(k_stage(stage), p.k.at(batch, token, kv_head), p.k.token,
                                        p.head_dim, p.aligned, exists);
    load_rows<columns, Traits::threads>(v_stage(stage), p.v.at(batch, token, kv_head), p.v.token,
                                        p.head_dim_v, p.aligned, exists);
    commit_copies();
  };
  const int64_t token = band.q.start + first_row;
  const int64_t line = batch * p.lse_batch + head * p.lse_head + token;
  const int rows_left = last_row + 1 - first_row;
  load_rows<rows, Traits::threads>(q_tile, p.q.at(batch, token, head), p.q.token, p.head_dim,
                                   p.aligned, [&](int row) { return row < rows_left; });
  load_rows<rows, Traits::threads>(
      dout_tile, p.dout.at(batch, token, head), p.dout.token, p.head_dim_v, p.aligned,
      [&](int row) { return row < rows_left && load(p.lse + (line + row)) != -infinity; });
  commit_copies();
  if (range.start < range.end) copy_tile(range.start, 0);

  const ScoreRule<T> rule(p.scores, band, batch, head);
  uint64_t seed = 0;
  if (Traits::full && p.scores.seed) seed = static_cast<uint64_t>(load(p.scores.seed));
  RowState state[m_tiles][2];
  FA_UNROLL
  for (int m = 0; m < m_tiles; ++m) {
    FA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = own_row + 16 * m + 8 * half + lane / 4;
      state[m][half] = row_state(p, line + row, row < rows_left);
    }
  }
  float dq[m_tiles][d_tiles][4];
  clear(dq);
  RegisterLeft<m_tiles, Traits::q_in_registers ? steps : 1> q_kept;
  if constexpr (Traits::q_in_registers) {
    wait_copies<0>();
    sync_block();
    q_kept.fill(q_tile, own_row);
  }
  RegisterLeft<m_tiles, Traits::dout_in_registers ? steps : 1> dout_kept;
  if constexpr (Traits::dout_in_registers) dout_kept.fill(dout_tile, own_row);
  for (int first = range.start, stage = 0; first < range.end; first += columns, stage ^= 1) {
    wait_copies<0>();  // this tile
    sync_block();      // and nobody reads the last one any more
    if (first + columns < range.end) copy_tile(first + columns, stage ^ 1);

    float s[m_tiles][n_tiles][4], dp[m_tiles][n_tiles][4];
    clear(s);
    clear(dp);
    if constexpr (Traits::q_in_registers) {
      add_product_transposed<steps>(s, q_kept, k_stage(stage));
    } else {
      add_product_transposed<steps>(s, SharedLeft<T, Traits::head_dim>(q_tile, own_row),
                                    k_stage(stage));
    }
    if constexpr (Traits::dout_in_registers) {
      add_product_transposed<steps>(dp, dout_kept, v_stage(stage));
    } else {
      add_product_transposed<steps>(dp, SharedLeft<T, Traits::head_dim>(dout_tile, own_row),
                                    v_stage(stage));
    }
    const bool crosses = range.crosses(first, columns);
    FA_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
      const int query = first_row + own_row + 16 * m;
      uint32_t kept = all_lanes;
      if (Traits::full && p.scores.seed) {
        kept = kept_weights<n_tiles>(p.scores.threshold, [&](int n) {
          return words_by_queries(seed, static_cast<uint32_t>(batch * p.heads + head), query,
                                  first + 8 * n);
        });
      }
      FA_UNROLL
      for (int n = 0; n < n_tiles; ++n) {
        FA_UNROLL
        for (int x = 0; x < 4; ++x) {
          dp[m][n][x] = score_gradient<Traits>(
                            p, rule, band, crosses, s[m][n][x], dp[m][n][x], state[m][x / 2],
                            (kept >> (4 * n + x)) & 1, query + lane / 4 + 8 * (x / 2),
                            first + 8 * n + 2 * (lane % 4) + x % 2)
                            .ds;
        }
      }
    }
    add_product<columns / 16>(dq, as_left<T>(dp), k_stage(stage));
  }
  wait_copies<0>();
  sync_block();  // the tile of Q may be written

  float factor[m_tiles][2];
  FA_UNROLL
  for (int m = 0; m < m_tiles; ++m) factor[m][0] = factor[m][1] = p.softmax_scale;
  store_rows(dq, factor, q_tile, own_row, p.dq.at(batch, token, head), p.dq.token, rows_left, rows,
             p.head_dim, p.aligned);
}

}  // namespace fastattn
