// The ops of attention.h: the call's dtype, device and stream.
#include "attention/attention.h"

#include "attention/launchers.cuh"

namespace fastattn {

extern template void launch_forward<half_t>(const Call&, const Tensor&, const Tensor&,
                                            const OptionalTensor&, Stream);
extern template void launch_forward<bfloat16_t>(const Call&, const Tensor&, const Tensor&,
                                                const OptionalTensor&, Stream);
extern template void launch_backward<half_t>(const Call&, const Tensor&, const Tensor&,
                                             const Tensor&, const Tensor&, const Tensor&,
                                             const OptionalTensor&, const Tensor&, const Tensor&,
                                             Stream);
extern template void launch_backward<bfloat16_t>(const Call&, const Tensor&, const Tensor&,
                                                 const Tensor&, const Tensor&, const Tensor&,
                                                 const OptionalTensor&, const Tensor&,
                                                 const Tensor&, Stream);

namespace {

bool is_half(const Tensor& q) {
  if (q.scalar_type() == ScalarType::Half) return true;
  if (q.scalar_type() == ScalarType::BFloat16) return false;
  throw std::runtime_error("fastattn: the CUDA kernels of attention take float16 and bfloat16");
}

}  // namespace

void attention_forward(Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, OptionalTensor mask,
                       OptionalTensor bias, OptionalTensor alibi_slopes, OptionalTensor sink,
                       OptionalTensor key_lengths, OptionalTensor cu_seqlens_q,
                       OptionalTensor cu_seqlens_k, OptionalTensor seqused_q,
                       OptionalTensor seqused_k, OptionalTensor dropout_seed, int64_t window_left,
                       int64_t window_right, bool top_left, double softmax_scale, double softcap,
                       double dropout_p, int64_t threshold, int64_t longest_q, int64_t longest_k) {
  const Call call{q, k, v, mask, bias, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k,
                  seqused_q, seqused_k, dropout_seed, window_left, window_right, top_left,
                  softmax_scale, softcap, dropout_p, threshold, longest_q, longest_k};
  const OnDevice on(q);
  const auto run = is_half(q) ? launch_forward<half_t> : launch_forward<bfloat16_t>;
  run(call, out, lse, sink, on.stream());
}

void attention_backward(Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor dout,
                        OptionalTensor dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                        OptionalTensor mask, OptionalTensor bias, OptionalTensor alibi_slopes,
                        OptionalTensor key_lengths, OptionalTensor cu_seqlens_q,
                        OptionalTensor cu_seqlens_k, OptionalTensor seqused_q,
                        OptionalTensor seqused_k, OptionalTensor dropout_seed, int64_t window_left,
                        int64_t window_right, bool top_left, double softmax_scale, double softcap,
                        double dropout_p, int64_t threshold, int64_t longest_q, int64_t longest_k) {
  const Call call{q, k, v, mask, bias, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k,
                  seqused_q, seqused_k, dropout_seed, window_left, window_right, top_left,
                  softmax_scale, softcap, dropout_p, threshold, longest_q, longest_k};
  const OnDevice on(q);
  const auto run = is_half(q) ? launch_backward<half_t> : launch_backward<bfloat16_t>;
  run(call, dq, dk, dv, delta, dout, dlse, out, lse, on.stream());
}

}  // namespace fastattn
