// Launches of layer_norm/forward.cuh.
//
// A thread holds 8 to 32 elements of its row, and a row lies on no more threads than that takes: a
// warp, or a part of one, up to 1024 elements of 16 bits, where sums need no barrier.
#include "layer_norm/forward.cuh"

#include "layer_norm/launchers.cuh"

namespace fastattn {
namespace {

template <class Streams, int V, int N>
void run(ForwardParams p, Stream stream) {
  constexpr int warp_rows_threads = 128;
  p.row_threads = row_threads(ceil_div(p.hidden, V), N);
  const int threads = p.row_threads > warp_threads ? p.row_threads : warp_rows_threads;
  const Grid grid{ceil_div(p.rows, threads / p.row_threads)};
  launch(norm_forward<ForwardTraits<Streams, V, N>>, "norm_forward", grid, threads,
         row_scratch_bytes, stream, p);
}

template <class Streams>
void run_alike(const ForwardParams& p, Stream stream) {
  constexpr int V = Streams::two_a_word ? 8 : 4;
  const int64_t vectors = p.hidden / V;
  if (vectors <= 32) return run<Streams, V, 1>(p, stream);
  if (vectors <= 64) return run<Streams, V, 2>(p, stream);
  if (vectors <= 96) return run<Streams, V, 3>(p, stream);
  if (vectors <= 128) return run<Streams, V, 4>(p, stream);
  if (vectors <= 1024) return run<Streams, V, 2>(p, stream);
  run<Streams, V, 4>(p, stream);
}

void run_mixed(const ForwardParams& p, Stream stream) {
  const int64_t vectors = p.hidden / 4;
  if (vectors <= 64 || (vectors > 128 && vectors <= 1024)) return run<Unknown, 4, 2>(p, stream);
  run<Unknown, 4, 4>(p, stream);
}

void run_one_by_one(const ForwardParams& p, Stream stream) {
  if (p.hidden <= 2048) return run<Unknown, 1, 4>(p, stream);
  run<Unknown, 1, 16>(p, stream);
}

template <int V, int N>
void run_long(ForwardParams p, Stream stream) {
  p.row_threads = long_row_threads;
  launch(norm_forward_long<ForwardTraits<Unknown, V, N>>, "norm_forward_long",
         Grid{p.rows}, long_row_threads, row_scratch_bytes, stream, p);
}

}  // namespace

// out, stream = norm(x + residual), x + residual. x and residual (rows, hidden) with contiguous
// rows, evenly spaced; out and stream contiguous; statistics float32, (2, rows) for layer_norm
// (`center`): rstd and mean, (1, rows) for rms_norm: rstd. No residual, no stream.
void layer_norm_forward(Tensor out, OptionalTensor stream, Tensor statistics, Tensor x,
                        OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
                        double eps, bool center) {
  const OnDevice device(x);
  ForwardParams p;
  p.x = source(x);
  p.residual = source(residual);
  p.weight = source(weight);
  p.bias = source(bias);
  p.out = sink(out);
  p.stream = sink(stream);
  p.rows = x.size(0);
  p.hidden = static_cast<int>(x.size(1));
  p.x_stride = x.stride(0);
  p.residual_stride = row_stride(residual);
  p.eps = static_cast<float>(eps);
  p.rstd = output<float>(statistics);
  p.mean = center ? p.rstd + p.rows : Global<float>{nullptr};

  const Family family = family_of(p.hidden, {x, residual, out, stream}, {weight, bias});
  if (p.hidden > longest_row(family)) {
    return vector_of(family) > 1 ? run_long<4, 2>(p, device.stream())
                                 : run_long<1, 4>(p, device.stream());
  }
  switch (family) {
    case Family::float16: return run_alike<Known<Element::float16>>(p, device.stream());
    case Family::bfloat16: return run_alike<Known<Element::bfloat16>>(p, device.stream());
    case Family::float32: return run_alike<Known<Element::float32>>(p, device.stream());
    case Family::mixed: return run_mixed(p, device.stream());
    default: return run_one_by_one(p, device.stream());
  }
}

}  // namespace fastattn

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn_cuda, m) {
  m.def(
      "layer_norm_forward(Tensor(a!) out, Tensor(b!)? stream, Tensor(c!) statistics, Tensor x, "
      "Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool center) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FA_DISPATCH_KEY, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&fastattn::layer_norm_forward));
}
