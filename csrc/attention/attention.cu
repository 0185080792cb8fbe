// attention and its backward as ops (fastattn/ops/attention/cuda.py allocates and calls): the
// call's dtype, device and stream.
//
// q, out, dout, dq (batch, seqlen_q, heads, width), k, v, dk, dv (batch, seqlen_k, kv_heads, width)
// with any strides but a last one of 1; lse and delta (batch, heads, seqlen_q) float32, contiguous.
// With cu_seqlens the batch is 1, and sequences lie one after another. bias and mask (boolean) have
// four dimensions, 1 where they are broadcast. `longest` is the length of the longest sequence.
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

// `delta` is scratch, like lse.
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

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn_cuda, m) {
  m.def(
      "attention_forward(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, "
      "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sink, Tensor? key_lengths, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "Tensor? seqused_q, Tensor? seqused_k, Tensor? dropout_seed, int window_left, "
      "int window_right, bool top_left, float softmax_scale, float softcap, float dropout_p, "
      "int threshold, int longest_q, int longest_k) -> ()");
  m.def(
      "attention_backward(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) delta, "
      "Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
      "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? key_lengths, Tensor? "
      "cu_seqlens_q, Tensor? cu_seqlens_k, "
      "Tensor? seqused_q, Tensor? seqused_k, Tensor? dropout_seed, int window_left, "
      "int window_right, bool top_left, float softmax_scale, float softcap, float dropout_p, "
      "int threshold, int longest_q, int longest_k) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FA_DISPATCH_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&fastattn::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastattn::attention_backward));
}
