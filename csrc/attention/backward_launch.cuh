// The launches of the backward, for one dtype.
#pragma once

#include "attention/backward.cuh"
#include "attention/launchers.cuh"

namespace fastattn {

template <class T>
void launch_delta(const Call& call, const Tensor& delta, const Tensor& dout,
                  const OptionalTensor& dlse, const Tensor& out, Stream stream) {
  DeltaParams<T> p{};
  p.dout = matrix<T>(dout);
  p.out = matrix<T>(out);
  p.dlse = input<float>(dlse);
  p.delta = output<float>(delta);
  p.heads = static_cast<int>(call.q.size(2));
  p.seqlen_q = static_cast<int>(call.q.size(1));
  p.head_dim_v = static_cast<int>(call.v.size(3));
  p.rows = delta.numel();
  p.aligned = are_aligned({dout, out});
  launch(delta_kernel<T>, "attention_delta", {(p.rows + delta_rows - 1) / delta_rows},
         delta_threads, 0, stream, p);
}

template <class T>
void launch_backward(const Call& call, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                     const Tensor& delta, const Tensor& dout, const OptionalTensor& dlse,
                     const Tensor& out, const Tensor& lse, Stream stream) {
  launch_delta<T>(call, delta, dout, dlse, out, stream);
  BackwardParams<T> p{};
  set_call(p, call);
  p.aligned = are_aligned({call.q, call.k, call.v, dout, dq, dk, dv});
  p.dout = matrix<T>(dout);
  p.dq = output_matrix<T>(dq);
  p.dk = output_matrix<T>(dk);
  p.dv = output_matrix<T>(dv);
  p.lse = input<float>(lse);
  p.delta = output<float>(delta);
  p.softmax_scale = static_cast<float>(call.softmax_scale);
  const auto keys = [&](auto traits) {
    using Traits = decltype(traits);
    p.tiles = ceil_div(call.longest_k, Traits::rows);
    launch(keys_kernel<Traits>, "attention_keys", {call.batch() * call.k.size(2) * p.tiles},
           Traits::threads, Traits::shared_bytes, stream, p);
  };
  const auto queries = [&](auto traits) {
    using Traits = decltype(traits);
    p.tiles = ceil_div(call.longest_q, Traits::rows);
    launch(queries_kernel<Traits>, "attention_queries", {call.batch() * p.heads * p.tiles},
           Traits::threads, Traits::shared_bytes, stream, p);
  };
  const auto both = [&](auto width, auto full) {
    constexpr int head_dim = decltype(width)::value;
    if constexpr (head_dim <= 128) {
      keys(KeysTraits<T, head_dim, full.value, Part::both>{});
    } else {
      keys(KeysTraits<T, head_dim, full.value, Part::keys>{});
      keys(KeysTraits<T, head_dim, full.value, Part::values>{});
    }
    queries(QueriesTraits<T, head_dim, full.value>{});
  };
  for_width(call, [&](auto width) {
    if (call.full()) {
      both(width, std::true_type{});
    } else {
      both(width, std::false_type{});
    }
  });
}

}  // namespace fastattn
