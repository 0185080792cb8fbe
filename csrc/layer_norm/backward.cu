// Launches of layer_norm/backward.cuh and layer_norm/column_sums.cuh.
//
// Beside a row and the next one's words, a thread holds two sums for each of its elements: about 8
// registers an element in all, so that 8192 elements fill a multiprocessor's 65536. Longer rows
// have their weights' gradients summed by a kernel of its own.
#include "layer_norm/backward.cuh"

#include "layer_norm/column_sums.cuh"
#include "layer_norm/launchers.cuh"

namespace fastattn {
namespace {

constexpr int64_t longest_row_with_sums = 8192;

template <class Streams, int V, int N>
void run(BackwardParams p, int64_t blocks, Stream stream) {
  constexpr int warp_rows_threads = N == 3 ? 128 : 256;
  p.row_threads = row_threads(ceil_div(p.hidden, V), N);
  const int groups = std::max(1, warp_rows_threads / p.row_threads);
  const int threads = groups * p.row_threads;
  const bool shared_sums = threads > std::max(p.row_threads, warp_threads);
  const int shared = row_scratch_bytes + (shared_sums ? p.hidden * int{sizeof(float)} : 0);
  constexpr int max_threads = N == 3 ? 128 : V * N == 8 && V == 8 ? 256 : 512;
  constexpr int on_multiprocessor = N == 3 ? 3 : 1;
  launch(norm_backward<BackwardTraits<Streams, V, N, true, max_threads, on_multiprocessor>>,
         "norm_backward", Grid{blocks}, threads, shared, stream, p);
}

template <class Streams, int V, int N, int MaxThreads>
void run_without_sums(BackwardParams p, Stream stream) {
  p.row_threads = row_threads(ceil_div(p.hidden, V), N);
  launch(norm_backward<BackwardTraits<Streams, V, N, false, MaxThreads, 1>>,
         "norm_backward without sums", Grid{p.rows}, p.row_threads, row_scratch_bytes, stream,
         p);
}

template <class Streams>
void run_halves(const BackwardParams& p, int64_t blocks, Stream stream) {
  const int64_t vectors = p.hidden / 8;
  if (vectors <= 32) return run<Streams, 8, 1>(p, blocks, stream);
  if (vectors > 64 && vectors <= 96) return run<Streams, 8, 3>(p, blocks, stream);
  if (p.hidden <= longest_row_with_sums) return run<Streams, 8, 2>(p, blocks, stream);
  run_without_sums<Streams, 8, 4, 512>(p, stream);
}

void run_floats(const BackwardParams& p, int64_t blocks, Stream stream) {
  using Streams = Known<Element::float32>;
  if (p.hidden <= 4096) return run<Streams, 4, 2>(p, blocks, stream);
  if (p.hidden <= longest_row_with_sums) return run<Streams, 4, 4>(p, blocks, stream);
  run_without_sums<Streams, 4, 8, 512>(p, stream);
}

void run_mixed(const BackwardParams& p, int64_t blocks, Stream stream) {
  if (p.hidden <= 4096) return run<Unknown, 4, 2>(p, blocks, stream);
  run<Unknown, 4, 4>(p, blocks, stream);
}

void run_one_by_one(const BackwardParams& p, int64_t blocks, Stream stream) {
  if (p.hidden <= 2048) return run<Unknown, 1, 4>(p, blocks, stream);
  run<Unknown, 1, 16>(p, blocks, stream);
}

template <int V>
void run_long(BackwardParams p, Stream stream) {
  p.row_threads = long_row_threads;
  launch(norm_backward_long<BackwardTraits<Unknown, V, 1, false, long_row_threads, 1>>,
         "norm_backward_long", Grid{p.rows}, long_row_threads, row_scratch_bytes, stream, p);
}

template <int V>
void partial_sums(const BackwardParams& p, int64_t blocks, Stream stream) {
  const Grid grid{ceil_div(p.hidden, partial_sums_threads * V), blocks};
  launch(norm_partial_sums<Unknown, V>, "norm_partial_sums", grid,
         partial_sums_threads, 0, stream, p);
}

void run_rows(Family family, const BackwardParams& p, int64_t blocks, Stream stream) {
  const bool alike = family != Family::mixed && family != Family::one_by_one;
  if (p.hidden > (alike ? longest_row(family) : longest_row_with_sums)) {
    return vector_of(family) > 1 ? run_long<4>(p, stream) : run_long<1>(p, stream);
  }
  switch (family) {
    case Family::float16: return run_halves<Known<Element::float16>>(p, blocks, stream);
    case Family::bfloat16: return run_halves<Known<Element::bfloat16>>(p, blocks, stream);
    case Family::float32: return run_floats(p, blocks, stream);
    case Family::mixed: return run_mixed(p, blocks, stream);
    default: return run_one_by_one(p, blocks, stream);
  }
}

}  // namespace

// The gradients of x, and of residual where its dtype is another, and of weight and bias if wanted:
// then `partials` is float32 scratch, (wanted of these two, blocks, hidden), whose number of blocks
// decides the order of the sums over rows.
void layer_norm_backward(Tensor dx, OptionalTensor dresidual, OptionalTensor dweight,
                         OptionalTensor dbias, OptionalTensor partials, Tensor dout,
                         OptionalTensor dstream, Tensor stream, OptionalTensor weight,
                         Tensor statistics, bool center) {
  const OnDevice device(stream);
  BackwardParams p;
  p.dout = source(dout);
  p.dstream = source(dstream);
  p.stream = source(stream);
  p.weight = source(weight);
  p.dx = sink(dx);
  p.dresidual = sink(dresidual);
  p.rows = stream.size(0);
  p.hidden = static_cast<int>(stream.size(1));
  p.inverse_hidden = 1.0f / static_cast<float>(p.hidden);
  p.dout_stride = dout.stride(0);
  p.dstream_stride = row_stride(dstream);
  p.stream_stride = stream.stride(0);
  p.rstd = input<float>(statistics);
  p.mean = center ? p.rstd + p.rows : Global<const float>{nullptr};

  // Nobody sums without partial sums: then as many blocks as rows.
  const int64_t blocks = partials ? partials->size(1) : p.rows;
  TotalSumsParams total{};
  total.blocks = static_cast<int>(blocks);
  total.hidden = p.hidden;
  int wanted = 0;
  const auto want = [&](const OptionalTensor& gradient, Global<float>& partial) {
    partial = Global<float>{nullptr};
    if (!gradient) return;
    partial = output<float>(*partials) + wanted * blocks * p.hidden;
    total.partial[wanted] = input<float>(*partials) + wanted * blocks * p.hidden;
    total.total[wanted] = sink(gradient);
    ++wanted;
  };
  want(dweight, p.dweight);
  want(dbias, p.dbias);

  const Family family = family_of(p.hidden, {dout, dstream, stream, dx, dresidual}, {weight});
  run_rows(family, p, blocks, device.stream());
  if (wanted == 0) return;
  if (p.hidden > longest_row_with_sums) {
    if (vector_of(family) > 1) {
      partial_sums<4>(p, blocks, device.stream());
    } else {
      partial_sums<1>(p, blocks, device.stream());
    }
  }
  launch(norm_total_sums<TotalSumsParams>, "norm_total_sums",
         Grid{ceil_div(p.hidden, warp_threads), wanted}, total_sums_threads,
         total_sums_threads * int{sizeof(float)}, device.stream(), total);
}

}  // namespace fastattn

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn_cuda, m) {
  m.def(
      "layer_norm_backward(Tensor(a!) dx, Tensor(b!)? dresidual, Tensor(c!)? dweight, "
      "Tensor(d!)? dbias, Tensor(e!)? partials, Tensor dout, Tensor? dstream, Tensor stream, "
      "Tensor? weight, Tensor statistics, bool center) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FA_DISPATCH_KEY, m) {
  m.impl("layer_norm_backward", TORCH_BOX(&fastattn::layer_norm_backward));
}
