// Sums of the columns of a matrix, of so many rows a block: bias gradients, in two stages. No
// atomics; the order of a sum depends only on the number of rows.
//
// A warp takes every eighth row, each of its lanes 16 bytes of it (one element where rows are not
// aligned), 4 rows at a time; then the block adds up its warps.
#pragma once

#include "device/barrier.cuh"
#include "device/launch.cuh"
#include "device/memory.cuh"

namespace fastattn::ffn {

template <class In, class Out>
struct ColumnSumsParams {
  Global<const In> matrix;  // (rows, columns)
  Global<Out> sums;         // (parts, columns)
  int64_t rows, row_stride, column_stride;
  int columns, column_blocks;
  int64_t rows_of_a_part;
};

template <class In_, class Out_, bool vectors>
struct ColumnSumsTraits {
  using In = In_;
  using Out = Out_;
  using Params = ColumnSumsParams<In, Out>;
  static constexpr int threads = 256, warps = threads / warp_threads;
  static constexpr int width = vectors ? 16 / static_cast<int>(sizeof(In)) : 1;  // of a lane
  static constexpr int columns = warp_threads * width;                          // of a block
  static constexpr int shared_bytes = warps * columns * 4;
};

template <class Traits>
FA_KERNEL(Traits::threads, 4)
void column_sums_kernel(FA_PARAMS(typename Traits::Params) p) {
  constexpr int width = Traits::width, batch = 4;
  const int64_t part = block_x() / p.column_blocks;
  const int first_column = block_x() % p.column_blocks * Traits::columns;
  const int column = first_column + lane_index() * width;
  const int64_t left = p.rows - part * p.rows_of_a_part;
  const int64_t rows = left < p.rows_of_a_part ? left : p.rows_of_a_part;
  const auto from =
      p.matrix + (part * p.rows_of_a_part * p.row_stride + column * p.column_stride);

  float sums[width] = {};
  for (int64_t start = warp_index(); start < rows; start += Traits::warps * batch) {
    Vector<typename Traits::In, width> values[batch];
    FA_UNROLL
    for (int i = 0; i < batch; ++i) {
      const int64_t row = start + i * Traits::warps;
      values[i] = {};
      if (row < rows && column < p.columns) {
        values[i] = load_vector<width>(from + row * p.row_stride);
      }
    }
    FA_UNROLL
    for (int i = 0; i < batch; ++i) {
      FA_UNROLL
      for (int e = 0; e < width; ++e) sums[e] += to_float(values[i][e]);
    }
  }

  const Shared<float> all = shared_memory<float>(0);
  FA_UNROLL
  for (int e = 0; e < width; ++e) {
    store(all + (warp_index() * Traits::columns + e * warp_threads + lane_index()), sums[e]);
  }
  sync_block();
  for (int at = thread_index(); at < Traits::columns; at += Traits::threads) {
    float sum = 0.0f;
    FA_UNROLL
    for (int warp = 0; warp < Traits::warps; ++warp) {
      sum += load(all + (warp * Traits::columns + at));
    }
    const int mine = first_column + at % warp_threads * width + at / warp_threads;
    if (mine < p.columns) {
      store(p.sums + (part * p.columns + mine), from_float<typename Traits::Out>(sum));
    }
  }
}

}  // namespace fastattn::ffn
