// Forward of layer_norm (Ba, Kiros and Hinton 2016, arXiv:1607.06450) and rms_norm (Zhang and
// Sennrich 2019, arXiv:1910.07467), with the addition of a residual:
//
//     s = x + residual, rounded to the stream's type and stored
//     m = sum(s) / hidden,  d = s - m          (0 and s for rms_norm)
//     e = sum(d) / hidden                      (what rounding left of the mean; 0 for rms_norm)
//     rstd = 1 / sqrt(sum(d^2) / hidden - e^2 + eps)
//     out = (d - e) rstd weight + bias,  mean = m + e
//
// One pass over memory: the row stays in registers between its two sums and its result. The variance
// is of deviations from the mean, corrected by the sum of these (the corrected two-pass algorithm of
// Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance"), so a mean that is
// large beside them cancels nothing.
#pragma once

#include "layer_norm/elements.cuh"
#include "layer_norm/row.cuh"

namespace fastattn {

struct ForwardParams {
  Source x, residual, weight, bias;  // (rows, hidden), (rows, hidden), (hidden,), (hidden,)
  Sink out, stream;                  // (rows, hidden), contiguous; stream null without a residual
  Global<float> rstd, mean;          // (rows,); no mean for rms_norm
  int64_t rows, x_stride, residual_stride;
  int hidden, row_threads;
  float eps;
};

// Rows of up to threads x Vectors x V elements. With four elements a vector a block has up to 1024
// threads of 64 registers; others need more registers.
template <class Streams_, int V_, int Vectors_>
struct ForwardTraits {
  using Streams = Streams_;
  static constexpr int V = V_, vectors = Vectors_;
  static constexpr int max_threads = V == 4 ? 1024 : 512;
};

// s of the columns that a thread holds, 0 beyond the row; stores it if asked to, where it is a sum.
template <class Streams, int N, int V>
FA_DEVICE void load_stream(const ForwardParams& p, int64_t row, bool present, bool keep,
                           const int (&columns)[N], float (&s)[N][V]) {
  Raw<Streams, V> x[N], residual[N];
  FA_UNROLL
  for (int n = 0; n < N; ++n) {
    // Two conditions of each load rather than a branch around the residual's: after a branch they
    // would wait for x.
    const bool inside = present && columns[n] < p.hidden;
    if (inside) x[n] = load_raw<Streams, V>(p.x, row * p.x_stride + columns[n]);
    if (inside && p.residual) {
      residual[n] = load_raw<Streams, V>(p.residual, row * p.residual_stride + columns[n]);
    }
  }
  FA_UNROLL
  for (int n = 0; n < N; ++n) {
    to_floats(x[n], p.x.element, s[n]);
    if (p.residual) {
      float addend[V];
      to_floats(residual[n], p.residual.element, addend);
      FA_UNROLL
      for (int i = 0; i < V; ++i) s[n][i] += addend[i];
      const Raw<Streams, V> rounded = from_floats<Streams>(s[n], p.stream.element);
      to_floats(rounded, p.stream.element, s[n]);
      if (keep && present && columns[n] < p.hidden) {
        store_raw(p.stream, row * p.hidden + columns[n], rounded);
      }
    }
  }
}

// Subtracts the mean of the columns inside the row; leaves 0 beyond it.
template <int N, int V>
FA_DEVICE void subtract(float mean, int hidden, const int (&columns)[N], float (&s)[N][V]) {
  FA_UNROLL
  for (int n = 0; n < N; ++n) {
    const float shift = columns[n] < hidden ? mean : 0.0f;
    FA_UNROLL
    for (int i = 0; i < V; ++i) s[n][i] -= shift;
  }
}

template <int N, int V>
FA_DEVICE float sum_of_squares(const float (&s)[N][V]) {
  float squares[N][V];
  FA_UNROLL
  for (int n = 0; n < N; ++n) {
    FA_UNROLL
    for (int i = 0; i < V; ++i) squares[n][i] = s[n][i] * s[n][i];
  }
  return sum_of(squares);
}

// 1 / sqrt(variance + eps) of the mean square of deviations from something `rest` off the mean.
FA_DEVICE float inverse_deviation(float mean_square, float rest, float eps) {
  const float variance = mean_square - rest * rest;
  return rsqrt((variance < 0.0f ? 0.0f : variance) + eps);
}

// out of a row's deviations from the mean.
template <class Streams, int N, int V>
FA_DEVICE void store_out(const ForwardParams& p, int64_t row, bool present, const int (&columns)[N],
                         float rstd, const float (&s)[N][V]) {
  FA_UNROLL
  for (int n = 0; n < N; ++n) {
    if (present && columns[n] < p.hidden) {
      float weight[V], bias[V], out[V];
      load_weights(p.weight, columns[n], 1.0f, weight);
      load_weights(p.bias, columns[n], 0.0f, bias);
      FA_UNROLL
      for (int i = 0; i < V; ++i) out[i] = fma(s[n][i] * rstd, weight[i], bias[i]);
      store_floats<Streams>(p.out, row * p.hidden + columns[n], out);
    }
  }
}

// Every group of threads has one row.
template <class Traits>
FA_KERNEL(Traits::max_threads, 1) void norm_forward(FA_PARAMS(ForwardParams) p) {
  constexpr int V = Traits::V, N = Traits::vectors;
  using Streams = typename Traits::Streams;
  RowThreads threads(p.row_threads);
  const int64_t row = static_cast<int64_t>(block_x()) * threads.rows_at_once() + threads.group;
  const bool present = row < p.rows;
  int columns[N];
  FA_UNROLL
  for (int n = 0; n < N; ++n) columns[n] = threads.column<V>(n);

  float s[N][V];
  load_stream<Streams>(p, row, present, true, columns, s);
  const float hidden = static_cast<float>(p.hidden);
  float rstd;
  if (p.mean) {
    float sum[1] = {sum_of(s)};
    threads.sum(sum);
    const float mean = sum[0] / hidden;
    subtract(mean, p.hidden, columns, s);
    float sums[2] = {sum_of(s), sum_of_squares(s)};
    threads.sum(sums);
    const float rest = sums[0] / hidden;
    subtract(rest, p.hidden, columns, s);
    rstd = inverse_deviation(sums[1] / hidden, rest, p.eps);
    if (present && threads.index == 0) store(p.mean + row, mean + rest);
  } else {
    float sum[1] = {sum_of_squares(s)};
    threads.sum(sum);
    rstd = inverse_deviation(sum[0] / hidden, 0.0f, p.eps);
  }
  if (present && threads.index == 0) store(p.rstd + row, rstd);
  store_out<Streams>(p, row, present, columns, rstd, s);
}

// One row a block, longer than its registers: read for each sum and for the result, the second and
// third time out of the L2 cache. The sum with the residual is computed again, not read back.
template <class Traits>
FA_KERNEL(Traits::max_threads, 1) void norm_forward_long(FA_PARAMS(ForwardParams) p) {
  constexpr int V = Traits::V, N = Traits::vectors;
  using Streams = typename Traits::Streams;
  RowThreads threads(p.row_threads);
  const int64_t row = block_x();
  const int step = N * V * p.row_threads;
  int columns[N];
  float s[N][V];
  const auto go_to = [&](int first) {
    FA_UNROLL
    for (int n = 0; n < N; ++n) columns[n] = first + threads.column<V>(n);
  };

  const float hidden = static_cast<float>(p.hidden);
  float mean = 0.0f;
  if (p.mean) {
    float sum[1] = {0.0f};
    for (int first = 0; first < p.hidden; first += step) {
      go_to(first);
      load_stream<Streams>(p, row, true, true, columns, s);
      sum[0] += sum_of(s);
    }
    threads.sum(sum);
    mean = sum[0] / hidden;
  }

  float sums[2] = {0.0f, 0.0f};
  for (int first = 0; first < p.hidden; first += step) {
    go_to(first);
    load_stream<Streams>(p, row, true, !p.mean, columns, s);
    subtract(mean, p.hidden, columns, s);
    sums[0] += sum_of(s);
    sums[1] += sum_of_squares(s);
  }
  threads.sum(sums);
  const float rest = p.mean ? sums[0] / hidden : 0.0f;
  const float rstd = inverse_deviation(sums[1] / hidden, rest, p.eps);
  if (threads.index == 0) {
    if (p.mean) store(p.mean + row, mean + rest);
    store(p.rstd + row, rstd);
  }

  for (int first = 0; first < p.hidden; first += step) {
    go_to(first);
    load_stream<Streams>(p, row, true, false, columns, s);
    subtract(mean, p.hidden, columns, s);
    subtract(rest, p.hidden, columns, s);
    store_out<Streams>(p, row, true, columns, rstd, s);
  }
}

}  // namespace fastattn
