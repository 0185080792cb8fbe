// The inputs of the attention kernels, and where a sequence's tokens and its band lie.
#pragma once

#include "device/math.cuh"
#include "device/memory.cuh"
#include "device/platform.cuh"

namespace fastattn {

// (batch, token, head, width) with the strides of the first three; of a packed call the batch's is
// 0, and its tokens lie one after another.
template <class E>
struct Matrix {
  Global<E> data;
  int64_t batch, token, head;
  FA_DEVICE Global<E> at(int64_t b, int64_t t, int64_t h) const {
    return data + (b * batch + t * token + h * head);
  }
};

// A vector of int32 or of int64, or none.
struct Index {
  Global<const int32_t> narrow;
  Global<const int64_t> wide;
  FA_DEVICE explicit operator bool() const {
    return static_cast<bool>(narrow) || static_cast<bool>(wide);
  }
  FA_DEVICE int64_t operator[](int64_t i) const { return wide ? load(wide + i) : load(narrow + i); }
};

// (batch, heads, seqlen_q, seqlen_k) with strides, 0 where it is broadcast.
template <class E>
struct Broadcast {
  Global<const E> data;
  int64_t batch, head, query, key;
  FA_DEVICE Global<const E> at(int64_t b, int64_t h) const { return data + (b * batch + h * head); }
};

// All that acts on the scores besides the band; the rule is in scores.cuh.
template <class T>
struct ScoreParams {
  float scale;    // softmax_scale, times log2(e) unless there is a softcap
  float softcap;  // 0 for none
  Broadcast<T> bias;
  Broadcast<float> bias_float32;  // instead of `bias`
  Broadcast<uint8_t> mask;
  Global<const float> slopes;  // of ALiBi
  int64_t slopes_batch;
  Global<const int64_t> seed;  // of dropout
  int threshold;               // a word below it, as int32, is dropped
  float inverse_keep;          // 1 / (1 - dropout_p); 1 without dropout
};

template <class T>
struct AttentionParams {
  Matrix<const T> q, k, v;
  ScoreParams<T> scores;
  Index key_lengths, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k;
  int sequences;
  int heads, group_size, seqlen_q, seqlen_k;  // of a packed call all tokens
  int tiles;                                  // of the side that a block holds, of one sequence
  int low, high;  // the band relative to the diagonal; beyond `unbounded` for none
  bool top_left;
  int head_dim, head_dim_v;
  bool aligned;  // every matrix can be copied 16 bytes at a time
  int64_t lse_batch, lse_head;
};

// Positions are less; a bound so far from the diagonal hides nothing.
constexpr int unbounded = 1 << 30;

// Contents of index tensors that point outside of the tensor are cut to it: nothing is read there.
struct Sequence {
  int64_t start;
  int length;
};

FA_DEVICE int64_t cut(int64_t x, int64_t least, int64_t most) {
  return x < least ? least : x > most ? most : x;
}

FA_DEVICE Sequence find_sequence(const Index& cu_seqlens, const Index& used, int batch,
                                 int seqlen) {
  Sequence found{0, seqlen};
  if (cu_seqlens) {
    found.start = cut(cu_seqlens[batch], 0, seqlen);
    found.length = static_cast<int>(cut(cu_seqlens[batch + 1], found.start, seqlen) - found.start);
  }
  if (used) found.length = static_cast<int>(cut(used[batch], 0, found.length));
  return found;
}

// The tokens of a packed call from the end of a sequence's tiles, or of what is used of it, to the
// next sequence, or after the last one: no sequence has them, and their results are zero. There are
// none of a padded call.
FA_DEVICE Sequence find_gap(const Index& cu_seqlens, int batch, int sequences, Sequence sequence,
                            int64_t covered, int tokens) {
  if (!cu_seqlens) return {0, 0};
  const int64_t start = sequence.start + cut(sequence.length, 0, covered);
  const int64_t end = batch + 1 < sequences ? cut(cu_seqlens[batch + 1], start, tokens) : tokens;
  return {start, static_cast<int>(end - start)};
}

// Which keys the queries of one sequence see: query i those from i + lowest to i + highest that lie
// before key_limit.
struct Band {
  Sequence q, k;
  int key_limit;
  int shift;  // of the diagonal of ALiBi, seqlen_k - seqlen_q
  int lowest, highest;

  FA_DEVICE bool sees(int i, int j) const {
    return j < key_limit && j >= i + lowest && j <= i + highest;
  }
};

template <class T>
FA_DEVICE Band find_band(const AttentionParams<T>& p, int batch) {
  Band band;
  band.q = find_sequence(p.cu_seqlens_q, p.seqused_q, batch, p.seqlen_q);
  band.k = find_sequence(p.cu_seqlens_k, p.seqused_k, batch, p.seqlen_k);
  band.key_limit = band.k.length;
  if (p.key_lengths) {
    band.key_limit = static_cast<int>(cut(p.key_lengths[batch], 0, band.k.length));
  }
  band.shift = band.k.length - band.q.length;
  const int64_t corner = p.top_left ? 0 : band.shift;
  const int64_t low = p.low <= -unbounded ? p.low : p.low + corner;
  const int64_t high = p.high >= unbounded ? p.high : p.high + corner;
  band.lowest = static_cast<int>(cut(low, -unbounded, unbounded));
  band.highest = static_cast<int>(cut(high, -unbounded, unbounded));
  return band;
}

// The share of one block of a grid over tiles, heads and sequences. Neighbours share a head, so that
// what they stream stays in the L2.
struct Work {
  int tile, head, batch;
};

FA_DEVICE Work find_work(int block, int tiles, int heads) {
  return {block % tiles, block / tiles % heads, block / tiles / heads};
}

// Positions of one side that a tile of the other side has to visit: from start, a multiple of the
// tiles' length, to end. Tiles within [whole_start, whole_end) are seen whole.
struct Range {
  int start, end, whole_start, whole_end;
  FA_DEVICE bool crosses(int first, int length) const {
    return first < whole_start || first + length > whole_end;
  }
};

FA_DEVICE Range tiles_of(int begin, int end, int whole_start, int whole_end, int length) {
  begin = begin > 0 ? begin : 0;
  const int start = begin / length * length;
  return {start, begin < end ? end : start, whole_start, whole_end};
}

FA_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Of the keys, for the queries from `first` to `last`.
FA_DEVICE Range keys_for(const Band& band, int first, int last, int length) {
  return tiles_of(first + band.lowest, smaller(band.key_limit, last + band.highest + 1),
                  last + band.lowest, smaller(band.key_limit, first + band.highest + 1), length);
}

// Of the queries, for the keys from `first` to `last`. Rows of keys after the key limit hold
// nothing of meaning, so the limit makes no tile less whole; queries after the last one neither.
FA_DEVICE Range queries_for(const Band& band, int first, int last, int length) {
  const int last_seen = smaller(last, band.key_limit - 1);
  const int end = first < band.key_limit ? smaller(band.q.length, last_seen + 1 - band.lowest) : 0;
  return tiles_of(first - band.highest, end, last - band.highest, first - band.lowest + 1, length);
}

}  // namespace fastattn
