// Backward of layer_norm and rms_norm. With u = (s - mean) rstd, mean = 0 for rms_norm, and
// g = dout weight:
//
//     ds = (g - mean(g) - u mean(g u)) rstd + dstream       (no mean(g) for rms_norm)
//     dweight = sum over rows of dout u,   dbias = sum over rows of dout
//
// On an H200 the instructions for an element weigh as much as its bytes. So d = s - mean stands for
// u, and the powers of rstd join what is computed once a row:
//
//     ds = g rstd - (mean(g) rstd + d (mean(g d) rstd^3)) + dstream
//
// Every block owns a contiguous range of rows and adds up their terms of dweight and dbias in
// registers, in the rows' order; its sums go to one row of the partial sums, which column_sums.cuh
// adds up in its turn. How many blocks there are is the caller's choice, and must depend on the
// shape only: then the sums have the same bits on every GPU.
//
// As soon as a row's words are turned into float32, the next row's are under way to their
// registers: a block's loads hardly cease.
#pragma once

#include "layer_norm/elements.cuh"
#include "layer_norm/row.cuh"

namespace fastattn {

struct BackwardParams {
  Source dout, dstream, stream, weight;  // dstream and weight may be null
  Sink dx, dresidual;                    // (rows, hidden), contiguous; dresidual may be null
  Global<const float> rstd, mean;        // (rows,); no mean for rms_norm
  Global<float> dweight, dbias;          // (blocks, hidden), partial sums; each may be null
  int64_t rows, dout_stride, dstream_stride, stream_stride;
  int hidden, row_threads;
  float inverse_hidden;  // 1 / hidden
};

// Rows of up to threads x Vectors x V elements, blocks of up to MaxThreads, so many of them on a
// multiprocessor; Sums: with partial sums.
template <class Streams_, int V_, int Vectors_, bool Sums_, int MaxThreads, int Blocks>
struct BackwardTraits {
  using Streams = Streams_;
  static constexpr int V = V_, vectors = Vectors_, max_threads = MaxThreads, blocks = Blocks;
  static constexpr bool sums = Sums_;
  // Where the next row's words fit beside this one's.
  static constexpr bool ahead = sums && Raw<Streams, V>::size * vectors <= 12;
};

// Where a thread's first column of a row is, in elements.
struct RowPlaces {
  int64_t dout, stream;

  FA_DEVICE RowPlaces(const BackwardParams& p, int64_t row, int column)
      : dout(row * p.dout_stride + column),
        stream(row * p.stream_stride + column) {}

  FA_DEVICE void advance(const BackwardParams& p, int rows) {
    dout += rows * p.dout_stride;
    stream += rows * p.stream_stride;
  }
};

// The inputs of a row's gradient, as they were read.
template <class Streams, int V, int N>
struct GradientRow {
  Raw<Streams, V> dout[N], stream[N];
  float rstd = 0.0f, mean = 0.0f;

  FA_DEVICE void load_from(const BackwardParams& p, const RowPlaces& places, int64_t row,
                           const int (&columns)[N]) {
    FA_UNROLL
    for (int n = 0; n < N; ++n) {
      if (columns[n] < p.hidden) {
        const int further = columns[n] - columns[0];
        dout[n] = load_raw<Streams, V>(p.dout, places.dout + further);
        stream[n] = load_raw<Streams, V>(p.stream, places.stream + further);
      }
    }
    rstd = load(p.rstd + row);
    if (p.mean) mean = load(p.mean + row);
  }

  // dout and d of vector n.
  FA_DEVICE void values(const BackwardParams& p, int n, float (&g)[V], float (&d)[V]) const {
    to_floats(dout[n], p.dout.element, g);
    to_floats(stream[n], p.stream.element, d);
    FA_UNROLL
    for (int i = 0; i < V; ++i) d[i] -= mean;
  }
};

template <class Streams, int V>
FA_DEVICE void load_dstream(const BackwardParams& p, int64_t row, bool present, int column,
                            Raw<Streams, V>& dstream) {
  if (p.dstream && present && column < p.hidden) {
    dstream = load_raw<Streams, V>(p.dstream, row * p.dstream_stride + column);
  }
}

// Of a row, what all its elements share: ds = g rstd - (shift + d slope) + dstream.
struct Slope {
  float rstd, shift, slope;

  // From the sums of g and g d.
  FA_DEVICE Slope(const BackwardParams& p, float rstd_, const float (&sums)[2]) : rstd(rstd_) {
    shift = p.mean ? sums[0] * p.inverse_hidden * rstd : 0.0f;
    slope = sums[1] * p.inverse_hidden * rstd * rstd * rstd;
  }
};

// ds of one vector into dx and dresidual.
template <class Streams, int V>
FA_DEVICE void store_gradient(const BackwardParams& p, int64_t place, int column,
                              const Slope& slope, const float (&g)[V], const float (&d)[V],
                              const Raw<Streams, V>& dstream) {
  float weight[V], ds[V];
  load_weights(p.weight, column, 1.0f, weight);
  FA_UNROLL
  for (int i = 0; i < V; ++i) {
    ds[i] = fma(g[i] * weight[i], slope.rstd, fma(-d[i], slope.slope, -slope.shift));
  }
  if (p.dstream) {
    float addend[V];
    to_floats(dstream, p.dstream.element, addend);
    FA_UNROLL
    for (int i = 0; i < V; ++i) ds[i] += addend[i];
  }
  store_floats<Streams>(p.dx, place, ds);
  if (p.dresidual) store_floats<Streams>(p.dresidual, place, ds);
}

// Adds up the block's groups of threads, in their order, and stores the sums at `to`. The groups
// are those of RowThreads, or warps where several rows share one: then lanes with the same columns
// are added up first. Leaves the shared memory free for the next sums.
template <int V, int N>
FA_DEVICE void store_sums(const RowThreads& threads, int hidden, const int (&columns)[N],
                          float (&sums)[N][V], Global<float> to) {
  for (int mask = threads.threads; mask < warp_threads; mask *= 2) {
    FA_UNROLL
    for (int n = 0; n < N; ++n) {
      FA_UNROLL
      for (int i = 0; i < V; ++i) sums[n][i] += shuffle_xor(sums[n][i], mask);
    }
  }
  constexpr int step = V < 4 ? V : 4;
  const bool first_of_its_kind =
      threads.threads >= warp_threads || lane_index() < threads.threads;
  const int group_threads = threads.threads < warp_threads ? warp_threads : threads.threads;
  const int groups = block_threads() / group_threads;
  const int group = thread_index() / group_threads;
  const Shared<float> total = shared_memory<float>(row_scratch_bytes);
  for (int turn = 0; turn < groups; ++turn) {
    if (turn == group && first_of_its_kind) {
      FA_UNROLL
      for (int n = 0; n < N; ++n) {
        FA_UNROLL
        for (int first = 0; first < V; first += step) {
          if (columns[n] < hidden) {
            Vector<float, step> part;
            if (turn > 0) part = load_vector<step>(total + (columns[n] + first));
            FA_UNROLL
            for (int i = 0; i < step; ++i) {
              part[i] = turn > 0 ? part[i] + sums[n][first + i] : sums[n][first + i];
            }
            if (turn < groups - 1) {
              store_vector(total + (columns[n] + first), part);
            } else {
              store_vector(to + (columns[n] + first), part);
            }
          }
        }
      }
    }
    if (groups > 1) sync_block();
  }
}

// One pass over a block's rows.
template <class Traits>
FA_KERNEL(Traits::max_threads, Traits::blocks)
void norm_backward(FA_PARAMS(BackwardParams) p) {
  constexpr int V = Traits::V, N = Traits::vectors;
  using Streams = typename Traits::Streams;
  RowThreads threads(p.row_threads);
  const int64_t begin = p.rows * block_x() / grid_x(), end = p.rows * (block_x() + 1) / grid_x();
  const int count = static_cast<int>(end - begin), at_once = threads.rows_at_once();
  int columns[N];
  FA_UNROLL
  for (int n = 0; n < N; ++n) columns[n] = threads.column<V>(n);

  float dweight[N][V] = {}, dbias[N][V] = {};
  GradientRow<Streams, V, N> row;
  RowPlaces places(p, begin + threads.group, columns[0]);
  if (Traits::ahead && threads.group < count) {
    row.load_from(p, places, begin + threads.group, columns);
  }
  for (int first = 0; first < count; first += at_once) {
    const int here = first + threads.group;
    const bool present = here < count;
    float g[N][V], d[N][V];
    if (!Traits::ahead && present) row.load_from(p, places, begin + here, columns);
    if constexpr (Traits::ahead) {
      FA_UNROLL
      for (int n = 0; n < N; ++n) row.values(p, n, g[n], d[n]);
    }
    const float rstd = row.rstd;
    places.advance(p, at_once);
    if (Traits::ahead && here + at_once < count) {
      row.load_from(p, places, begin + here + at_once, columns);
    }

    // Additions side by side; each takes registers.
    constexpr int chains = V == 1 ? 1 : 4;
    float g_terms[1][chains] = {}, gd_terms[1][chains] = {};
    FA_UNROLL
    for (int n = 0; n < N; ++n) {
      if (present && columns[n] < p.hidden) {
        if constexpr (!Traits::ahead) row.values(p, n, g[n], d[n]);
        float weight[V];
        load_weights(p.weight, columns[n], 1.0f, weight);
        FA_UNROLL
        for (int i = 0; i < V; ++i) {
          const float term = g[n][i] * d[n][i];
          if constexpr (Traits::sums) {
            dweight[n][i] = fma(term, rstd, dweight[n][i]);
            dbias[n][i] += g[n][i];
          }
          g_terms[0][i % chains] = fma(g[n][i], weight[i], g_terms[0][i % chains]);
          gd_terms[0][i % chains] = fma(term, weight[i], gd_terms[0][i % chains]);
        }
      }
    }
    // Not earlier, for its registers are needed above; but the sum hides a part of the wait.
    Raw<Streams, V> dstream[N];
    constexpr bool dstream_ahead = Traits::ahead && N < 3;
    if constexpr (dstream_ahead) {
      FA_UNROLL
      for (int n = 0; n < N; ++n) load_dstream(p, begin + here, present, columns[n], dstream[n]);
    }
    float sums[2] = {sum_of(g_terms), sum_of(gd_terms)};
    threads.sum(sums);
    const Slope slope(p, rstd, sums);
    FA_UNROLL
    for (int n = 0; n < N; ++n) {
      if (present && columns[n] < p.hidden) {
        if constexpr (!Traits::ahead) row.values(p, n, g[n], d[n]);
        if constexpr (!dstream_ahead) {
          load_dstream(p, begin + here, present, columns[n], dstream[n]);
        }
        const int64_t place = (begin + here) * p.hidden + columns[n];
        store_gradient(p, place, columns[n], slope, g[n], d[n], dstream[n]);
      }
    }
  }
  if constexpr (Traits::sums) {
    const int64_t place = static_cast<int64_t>(block_x()) * p.hidden;
    if (p.dweight) store_sums(threads, p.hidden, columns, dweight, p.dweight + place);
    if (p.dbias) store_sums(threads, p.hidden, columns, dbias, p.dbias + place);
  }
}

// One row a block, longer than its registers: read twice, the second time out of the caches.
template <class Traits>
FA_KERNEL(Traits::max_threads, Traits::blocks)
void norm_backward_long(FA_PARAMS(BackwardParams) p) {
  constexpr int V = Traits::V;
  using Streams = typename Traits::Streams;
  RowThreads threads(p.row_threads);
  const int64_t row = block_x();
  const int step = V * p.row_threads;
  GradientRow<Streams, V, 1> part;
  float sums[2] = {0.0f, 0.0f}, g[V], d[V], weight[V];
  for (int first = threads.column<V>(0); first < p.hidden; first += step) {
    const int columns[1] = {first};
    part.load_from(p, RowPlaces(p, row, first), row, columns);
    part.values(p, 0, g, d);
    load_weights(p.weight, first, 1.0f, weight);
    FA_UNROLL
    for (int i = 0; i < V; ++i) {
      sums[0] = fma(g[i], weight[i], sums[0]);
      sums[1] = fma(g[i] * d[i], weight[i], sums[1]);
    }
  }
  threads.sum(sums);
  const Slope slope(p, part.rstd, sums);
  for (int first = threads.column<V>(0); first < p.hidden; first += step) {
    const int columns[1] = {first};
    part.load_from(p, RowPlaces(p, row, first), row, columns);
    part.values(p, 0, g, d);
    Raw<Streams, V> dstream;
    load_dstream(p, row, true, first, dstream);
    store_gradient(p, row * p.hidden + first, first, slope, g, d, dstream);
  }
}

}  // namespace fastattn
