// Which weights dropout keeps, for the accumulators of a 16 x 8 tile.
//
// Weight (b, h, i, j) takes word j % 4 of the Philox block with the counter
// (i, j / 4, b heads + h, 0) under the call's seed, as fastattn/ops/common/dropout.py defines
// it. A block serves 4 keys of one query, which lie in different lanes: each lane computes one
// block, and the lanes exchange the words. All lanes of the warp must call.
#pragma once

#include "device/philox.cuh"
#include "device/platform.cuh"
#include "device/warp.cuh"

namespace fastattn {

struct DropoutWords {
  uint32_t words[4];
  FA_DEVICE bool keeps(int x, int threshold) const {
    return static_cast<int>(words[x]) >= threshold;
  }
};

// words[x] belongs to d[x] of a tile of queries, from `query` on, by keys, from `key` on.
FA_DEVICE DropoutWords words_by_queries(uint64_t seed, uint32_t plane, int query, int key) {
  // Lanes 2n and 2n + 1 hold the 4 keys of a block for the rows g and g + 8: one computes the
  // upper row's block, one the lower's.
  const int lane = lane_index();
  const bool odd = lane % 2 == 1;
  const uint32_t row = static_cast<uint32_t>(query + lane / 4 + (odd ? 8 : 0));
  const uint32_t quad = static_cast<uint32_t>((key + 2 * (lane % 4)) / 4);
  const PhiloxBlock own = philox(seed, row, quad, plane, 0);
  const uint32_t a = shuffle_xor(odd ? own.words[0] : own.words[2], 1);
  const uint32_t b = shuffle_xor(odd ? own.words[1] : own.words[3], 1);
  if (odd) return {{a, b, own.words[2], own.words[3]}};
  return {{own.words[0], own.words[1], a, b}};
}

// words[x] belongs to d[x] of a tile of keys by queries.
FA_DEVICE DropoutWords words_by_keys(uint64_t seed, uint32_t plane, int key, int query) {
  // The 4 lanes of a block's keys need the blocks of the queries c and c + 1 for the keys of the
  // rows g and g + 8. Lane t of them computes block t of those, then the four transpose.
  const int lane = lane_index();
  const int t = lane / 4 % 4;
  const uint32_t row = static_cast<uint32_t>(query + 2 * (lane % 4) + t % 2);
  const uint32_t quad = static_cast<uint32_t>((key + 8 * (t / 2)) / 4 + lane / 16);
  PhiloxBlock block = philox(seed, row, quad, plane, 0);
  uint32_t(&w)[4] = block.words;
  const bool odd = t % 2 == 1, upper = t / 2 == 1;
  FA_UNROLL
  for (int pair = 0; pair < 4; pair += 2) {
    const uint32_t got = shuffle_xor(odd ? w[pair] : w[pair + 1], 4);
    w[pair] = odd ? got : w[pair];
    w[pair + 1] = odd ? w[pair + 1] : got;
  }
  FA_UNROLL
  for (int pair = 0; pair < 2; ++pair) {
    const uint32_t got = shuffle_xor(upper ? w[pair] : w[pair + 2], 8);
    w[pair] = upper ? got : w[pair];
    w[pair + 2] = upper ? w[pair + 2] : got;
  }
  return {{w[0], w[1], w[2], w[3]}};
}

}  // namespace fastattn
