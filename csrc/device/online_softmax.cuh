// The running softmax of a row (Milakov and Gimelshein 2018, arXiv:1805.02867): its maximum and the
// sum of its exponentials so far, to base 2.
#pragma once

#include "device/math.cuh"

namespace fastattn {

struct OnlineSoftmax {
  float maximum = -infinity;
  float sum = 0.0f;

  // Takes note that scores up to `tile_maximum` follow. What was summed before, values included,
  // has to be multiplied with the result.
  FA_DEVICE float raise(float tile_maximum) {
    const float before = maximum;
    maximum = max(maximum, tile_maximum);
    const float factor = before == maximum ? 1.0f : exp2_fast(before - maximum);
    sum *= factor;
    return factor;
  }

  // To be subtracted from a score before exp2_fast: the maximum, and 0 for a row that has seen no
  // key, whose scores are all -inf.
  FA_DEVICE float shift() const { return maximum == -infinity ? 0.0f : maximum; }

  // 1 / sum, and 0 for a row without a key.
  FA_DEVICE float inverse() const { return sum > 0.0f || is_nan(sum) ? 1.0f / sum : 0.0f; }

  // The natural logarithm of the sum of exponentials; -inf for a row without a key.
  FA_DEVICE float lse() const {
    return sum > 0.0f || is_nan(sum) ? (maximum + log2_fast(sum)) * ln_2 : -infinity;
  }
};

}  // namespace fastattn
