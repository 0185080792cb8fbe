// Joins the results of attention on parts of the keys (Rabe and Staats 2021, arXiv:2112.05682):
//
//     lse = log sum_s exp(lse_s),  out = sum_s exp(lse_s - lse) out_s
//
// One block for a row; one of a sequence in one part has nothing to do. Groups of HeadDim / 4 threads, 4 columns each, take every groups-th part,
// and their sums are added in their order: a result depends only on the row's parts.
#pragma once

#include "attention/decode_cache.cuh"
#include "device/online_softmax.cuh"
#include "device/reduce.cuh"

namespace fastattn {

template <class Element, int HeadDim>
struct MergeTraits {
  using T = Element;
  static constexpr int head_dim = HeadDim;
  static constexpr int threads = 256;
  static constexpr int lanes = HeadDim / 4;
  static constexpr int groups = threads / lanes;
  static constexpr int unrolled = 4;  // parts that a group has under way
  static constexpr int sums_bytes = groups * HeadDim * 4;
  static constexpr int shared_bytes = sums_bytes + threads / warp_threads * 2 * 4;
};

template <class T>
struct MergeParams {
  Global<T> out;                    // (batch, seqlen_q, heads, head_dim_v), contiguous
  Global<float> lse;                // (batch, heads, seqlen_q), contiguous
  Global<const float> part_out;     // (split.most, batch, seqlen_q, heads, part_width)
  Global<const float> part_lse;     // (split.most, batch, seqlen_q, heads)
  CacheParams cache;
  int batch, seqlen_q, heads;
  Split split;
  int part_width;  // a multiple of 4
};

template <class Traits>
FA_KERNEL(Traits::threads, 4)
void merge_kernel(FA_PARAMS(MergeParams<typename Traits::T>) p) {
  constexpr int warps = Traits::threads / warp_threads;
  const int thread = thread_index();
  const int64_t row = block_x();  // of (batch, seqlen_q, heads)
  const int64_t rows = int64_t{p.batch} * p.seqlen_q * p.heads;
  const int head = static_cast<int>(row % p.heads);
  const int query = static_cast<int>(row / p.heads % p.seqlen_q);
  const int batch = static_cast<int>(row / p.heads / p.seqlen_q);
  const int parts = p.split.parts(keys_held(p.cache, batch));
  if (parts == 1) return;
  const Global<const float> lse = p.part_lse + row;

  const Shared<float> sums = shared_memory<float>(0);
  const Shared<float> maxima = shared_memory<float>(Traits::sums_bytes);
  const Shared<float> scratch = maxima + warps;
  float top = -infinity;
  for (int s = thread; s < parts; s += Traits::threads) top = max(top, load(lse + s * rows));
  top = warp_max(top);
  if (lane_index() == 0) store(maxima + warp_index(), top);
  sync_block();
  OnlineSoftmax whole;
  FA_UNROLL
  for (int w = 0; w < warps; ++w) whole.raise(load(maxima + w) * log2_e);
  float total = 0.0f;
  for (int s = thread; s < parts; s += Traits::threads) {
    total += exp2_fast(load(lse + s * rows) * log2_e - whole.shift());
  }
  whole.sum = block_sum<Traits::threads>(total, scratch);

  const int group = thread / Traits::lanes, column = thread % Traits::lanes * 4;
  Vector<float, 4> sum = {};
  if (column < p.part_width) {
    for (int first = group; first < parts; first += Traits::groups * Traits::unrolled) {
      float weight[Traits::unrolled];
      Vector<float, 4> part[Traits::unrolled];
      FA_UNROLL
      for (int u = 0; u < Traits::unrolled; ++u) {
        const int s = first + u * Traits::groups;
        weight[u] = s < parts ? load(lse + s * rows) * log2_e : -infinity;
      }
      FA_UNROLL
      for (int u = 0; u < Traits::unrolled; ++u) {
        const int64_t s = first + u * Traits::groups;
        part[u] = {};
        // A part in which the row saw no key was not written.
        if (weight[u] != -infinity) {
          part[u] = load_vector<4>(p.part_out + ((s * rows + row) * p.part_width + column));
        }
      }
      FA_UNROLL
      for (int u = 0; u < Traits::unrolled; ++u) {
        weight[u] = exp2_fast(weight[u] - whole.shift());
        FA_UNROLL
        for (int e = 0; e < 4; ++e) sum[e] = fma(part[u][e], weight[u], sum[e]);
      }
    }
  }
  store_vector(sums + (group * Traits::head_dim + column), sum);
  sync_block();

  for (int c = thread; c < p.cache.head_dim_v; c += Traits::threads) {
    float result = 0.0f;
    FA_UNROLL
    for (int g = 0; g < Traits::groups; ++g) result += load(sums + (g * Traits::head_dim + c));
    const auto rounded = from_float<typename Traits::T>(result * whole.inverse());
    store(p.out + (row * p.cache.head_dim_v + c), rounded);
  }
  if (thread == 0) {
    store(p.lse + ((int64_t{batch} * p.heads + head) * p.seqlen_q + query), whole.lse());
  }
}

}  // namespace fastattn
