// The launch of the forward, for one dtype.
#pragma once

#include "attention/forward.cuh"
#include "attention/launchers.cuh"

namespace fastattn {

template <class T>
void launch_forward(const Call& call, const Tensor& out, const Tensor& lse,
                    const OptionalTensor& sink, Stream stream) {
  ForwardParams<T> p{};
  set_call(p, call);
  p.aligned = are_aligned({call.q, call.k, call.v, out});
  p.out = output_matrix<T>(out);
  p.lse = output<float>(lse);
  p.sink = input<T>(only_if(!is_float32(sink), sink));
  p.sink_float32 = input<float>(only_if(is_float32(sink), sink));
  const auto run = [&](auto traits) {
    using Traits = decltype(traits);
    p.tiles = ceil_div(call.longest_q, Traits::rows);
    launch(forward_kernel<Traits>, "attention_forward", {call.batch() * p.heads * p.tiles},
           Traits::threads, Traits::shared_bytes, stream, p);
  };
  for_width(call, [&](auto width) {
    constexpr int head_dim = decltype(width)::value;
    if (call.full()) {
      run(ForwardTraits<T, head_dim, true>{});
    } else {
      run(ForwardTraits<T, head_dim, false>{});
    }
  });
}

}  // namespace fastattn
