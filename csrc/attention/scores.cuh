// The score of a query and a key, as forward and backward kernels share it:
//
//     s = softmax_scale q.k;  s = c tanh(s / c);  s -= slope |i + Sk - Sq - j|;  s += bias;
//     s = -inf where the band, the key's length or the mask hides it
//
// in units of log2(e), so that exp(s) is exp2. A call uses what it has; the flags are the same for
// all threads.
#pragma once

#include "attention/params.cuh"
#include "device/math.cuh"

namespace fastattn {

struct Score {
  float value;      // -inf if hidden
  float cap_slope;  // the softcap's derivative, 1 without one
};

// The scores of one head of one sequence.
template <class T>
class ScoreRule {
 public:
  FA_DEVICE ScoreRule(const ScoreParams<T>& p, const Band& band, int batch, int head)
      : p_(p), band_(band) {
    if (p.bias.data) bias_ = p.bias.at(batch, head);
    if (p.bias_float32.data) bias_float32_ = p.bias_float32.at(batch, head);
    if (p.mask.data) mask_ = p.mask.at(batch, head);
    if (p.slopes) slope_ = load(p.slopes + (batch * p.slopes_batch + head)) * log2_e;
  }

  // `product` is q.k of query i and key j; both may lie after their sequence's end.
  FA_DEVICE Score operator()(float product, int i, int j) const {
    Score score{product * p_.scale, 1.0f};
    if (p_.softcap != 0.0f) {
      const float saturation = tanh(product * (p_.scale / p_.softcap));
      score.value = saturation * (p_.softcap * log2_e);
      score.cap_slope = 1.0f - saturation * saturation;
    }
    const int distance = i + band_.shift - j;
    score.value -= slope_ * static_cast<float>(distance < 0 ? -distance : distance);
    bool seen = band_.sees(i, j);
    const bool exists = i < band_.q.length && j < band_.key_limit;
    if (bias_) {
      if (exists) score.value += in_base_2(to_float(at(bias_, p_.bias, i, j)));
    } else if (bias_float32_) {
      if (exists) score.value += in_base_2(at(bias_float32_, p_.bias_float32, i, j));
    }
    if (mask_) seen = seen && exists && at(mask_, p_.mask, i, j) != 0;
    if (!seen) score.value = -infinity;
    return score;
  }

 private:
  template <class E>
  FA_DEVICE static E at(Global<const E> corner, const Broadcast<E>& strides, int i, int j) {
    return load(corner + (i * strides.query + j * strides.key));
  }

  // A finite bias stays finite: masks made of the smallest float32 hide, but not a whole row.
  FA_DEVICE static float in_base_2(float bias) {
    const float scaled = bias * log2_e;
    return scaled == -infinity && bias != -infinity ? -3.4e38f : scaled;
  }

  const ScoreParams<T>& p_;
  const Band& band_;
  Global<const T> bias_{};
  Global<const float> bias_float32_{};
  Global<const uint8_t> mask_{};
  float slope_ = 0.0f;
};

}  // namespace fastattn
