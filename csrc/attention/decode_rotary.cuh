// Rotary position embedding (Su et al. 2021, arXiv:2104.09864, equation 34):
//     x'[a] = x[a] cos - x[b] sin,  x'[b] = x[b] cos + x[a] sin
// for the pairs (a, b) = (c, c + half), or (2 c, 2 c + 1) interleaved, c < half, with the angle of
// the token's position and c. Columns from 2 half on stay as they are.
#pragma once

#include "attention/decode_cache.cuh"

namespace fastattn {

// Tables (positions, half) of float32, or of T.
template <class T>
struct Rotary {
  Global<const float> cos, sin;
  Global<const T> cos_of_t, sin_of_t;
  int half;
  int64_t positions;
  bool interleaved;
  bool advances;  // query i stands i after the first one, else all where the first stands

  FA_DEVICE explicit operator bool() const { return half > 0; }
};

// Column `column` of the turned row, in float32. Positions outside of the tables are cut to them.
template <class T>
FA_DEVICE float rotated(Global<const T> row, int column, const Rotary<T>& rotary,
                        int64_t position) {
  const float x = to_float(load(row + column));
  const int half = rotary.half;
  if (column >= 2 * half) return x;
  const bool second = rotary.interleaved ? column % 2 == 1 : column >= half;
  const int step = rotary.interleaved ? 1 : half;
  const float other = to_float(load(row + (second ? column - step : column + step)));
  const int pair = rotary.interleaved ? column / 2 : second ? column - half : column;
  const int64_t angle = cut(position, 0, rotary.positions - 1) * half + pair;
  const bool full = bool(rotary.cos);
  const float cos = full ? load(rotary.cos + angle) : to_float(load(rotary.cos_of_t + angle));
  const float sin = full ? load(rotary.sin + angle) : to_float(load(rotary.sin_of_t + angle));
  return x * cos + (second ? other : -other) * sin;
}

}  // namespace fastattn
