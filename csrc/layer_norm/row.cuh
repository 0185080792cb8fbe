// How a row lies on threads, and sums over it.
//
// `threads` neighbouring threads of a block share a row: a power of two up to 32, or whole warps;
// the block works on as many rows at once as it has such groups. Vector n of thread t holds the V
// columns from (n threads + t) V on, so that neighbours read neighbouring vectors. Every sum has
// one order, given only by `threads`: a row's result depends on nothing but the row.
#pragma once

#include "device/reduce.cuh"

namespace fastattn {

// Two values a warp, twice: a warp may begin the next sum while others still read the last.
constexpr int row_scratch_bytes = 2 * 2 * warp_threads * sizeof(float);

struct RowThreads {
  int threads;
  int group;   // of this thread: which of the rows that the block holds at once
  int index;   // of this thread in its row
  int turn = 0;

  FA_DEVICE explicit RowThreads(int row_threads)
      : threads(row_threads),
        group(thread_index() / row_threads),
        index(thread_index() % row_threads) {}

  FA_DEVICE int rows_at_once() const { return block_threads() / threads; }

  template <int V>
  FA_DEVICE int column(int n) const {
    return n * (threads * V) + index * V;
  }

  // Adds up each of `values` over the threads of a row; all of them get the sums. Every thread of
  // the block must come here. `row_scratch_bytes` of shared memory, from its start, belong to it.
  template <int Count>
  FA_DEVICE void sum(float (&values)[Count]) {
    static_assert(Count <= 2, "see row_scratch_bytes");
    for (int mask = (threads < warp_threads ? threads : warp_threads) / 2; mask > 0; mask /= 2) {
      FA_UNROLL
      for (int i = 0; i < Count; ++i) values[i] += shuffle_xor(values[i], mask);
    }
    if (threads <= warp_threads) return;
    const int warps = threads / warp_threads;
    const Shared<float> scratch = shared_memory<float>(0) + turn * 2 * warp_threads;
    turn ^= 1;
    if (lane_index() == 0) {
      FA_UNROLL
      for (int i = 0; i < Count; ++i) store(scratch + (i * warp_threads + warp_index()), values[i]);
    }
    sync_block();
    FA_UNROLL
    for (int i = 0; i < Count; ++i) {
      const int place = i * warp_threads + group * warps + lane_index();
      values[i] = warp_sum(lane_index() < warps ? load(scratch + place) : 0.0f);
    }
  }
};

// The sum of a thread's own values, in V chains.
template <int N, int V>
FA_DEVICE float sum_of(const float (&values)[N][V]) {
  float sums[V];
  FA_UNROLL
  for (int i = 0; i < V; ++i) {
    sums[i] = values[0][i];
    FA_UNROLL
    for (int n = 1; n < N; ++n) sums[i] += values[n][i];
  }
  FA_UNROLL
  for (int half = V / 2; half > 0; half /= 2) {
    FA_UNROLL
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

}  // namespace fastattn
