// The sums over rows that are the gradients of weight and bias.
//
// The second stage adds up the partial sums of the blocks that went over the rows. Where rows are
// too long for their sums to stay in registers beside them (backward.cuh), a kernel of its own
// makes the partial sums. Both add in an order that only the shape decides.
#pragma once

#include "layer_norm/backward.cuh"

namespace fastattn {

constexpr int partial_sums_threads = 256;

// V columns a thread, over one range of rows a block (y).
template <class Streams, int V>
FA_KERNEL(partial_sums_threads, 2) void norm_partial_sums(FA_PARAMS(BackwardParams) p) {
  constexpr int at_once = 4;  // rows under way
  const int column = (block_x() * partial_sums_threads + thread_index()) * V;
  if (column >= p.hidden) return;
  const int columns[1] = {column};
  const int64_t begin = p.rows * block_y() / grid_y(), end = p.rows * (block_y() + 1) / grid_y();
  float dweight[V] = {}, dbias[V] = {};
  for (int64_t first = begin; first < end; first += at_once) {
    GradientRow<Streams, V, 1> rows[at_once];
    FA_UNROLL
    for (int r = 0; r < at_once; ++r) {
      const int64_t row = first + r;
      if (row < end) rows[r].load_from(p, RowPlaces(p, row, column), row, columns);
    }
    FA_UNROLL
    for (int r = 0; r < at_once; ++r) {
      float g[V], d[V];
      rows[r].values(p, 0, g, d);
      FA_UNROLL
      for (int i = 0; i < V; ++i) {
        dweight[i] = fma(g[i] * d[i], rows[r].rstd, dweight[i]);
        dbias[i] += g[i];
      }
    }
  }
  const int64_t place = static_cast<int64_t>(block_y()) * p.hidden + column;
  FA_UNROLL
  for (int i = 0; i < V; ++i) {
    if (p.dweight) store(p.dweight + (place + i), dweight[i]);
    if (p.dbias) store(p.dbias + (place + i), dbias[i]);
  }
}

struct TotalSumsParams {
  Global<const float> partial[2];  // (blocks, hidden)
  Sink total[2];                   // (hidden,)
  int blocks, hidden;
};

constexpr int total_sums_threads = 512;

// 32 columns a block, of the sum with the number y; every warp adds up each 16th partial sum.
template <class Params>
FA_KERNEL(total_sums_threads, 1) void norm_total_sums(FA_PARAMS(Params) p) {
  constexpr int warps = total_sums_threads / warp_threads;
  constexpr int at_once = 8;  // loads under way
  const Global<const float> partial = p.partial[block_y()];
  const int column = block_x() * warp_threads + lane_index();
  const bool inside = column < p.hidden;
  float sum = 0.0f;
  for (int first = warp_index(); first < p.blocks; first += warps * at_once) {
    float terms[at_once];
    FA_UNROLL
    for (int i = 0; i < at_once; ++i) {
      const int block = first + i * warps;
      const bool present = inside && block < p.blocks;
      terms[i] = present ? load(partial + (static_cast<int64_t>(block) * p.hidden + column)) : 0.0f;
    }
    FA_UNROLL
    for (int i = 0; i < at_once; ++i) sum += terms[i];
  }
  const Shared<float> sums = shared_memory<float>(0);
  store(sums + thread_index(), sum);
  sync_block();
  if (warp_index() > 0 || !inside) return;
  float total[1] = {0.0f};
  FA_UNROLL
  for (int warp = 0; warp < warps; ++warp) {
    total[0] += load(sums + (warp * warp_threads + lane_index()));
  }
  store_floats<Unknown>(p.total[block_y()], column, total);
}

}  // namespace fastattn
