// Philox 4x32-10, the counter-based random numbers of dropout (Salmon et al. 2011, "Parallel random
// numbers: as easy as 1, 2, 3").
#pragma once

#include "device/math.cuh"

namespace fastattn {

struct PhiloxBlock {
  uint32_t words[4];
};

// The block of four words with the counter (c0, c1, c2, c3) under a 64-bit key.
FA_DEVICE PhiloxBlock philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  FA_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = multiply_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastattn
