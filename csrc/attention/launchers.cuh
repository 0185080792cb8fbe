// The host's side of attention: a call's tensors as the kernels' parameters, and the choice of an
// instantiation.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "attention/params.cuh"
#include "device/tensor.cuh"

namespace fastattn {

using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// Arguments that forward and backward share.
struct Call {
  const Tensor &q, &k, &v;
  const OptionalTensor &mask, &bias, &alibi_slopes, &key_lengths, &cu_seqlens_q, &cu_seqlens_k,
      &seqused_q, &seqused_k, &dropout_seed;
  int64_t window_left, window_right;
  bool top_left;
  double softmax_scale, softcap, dropout_p;
  int64_t threshold, longest_q, longest_k;

  bool packed() const { return cu_seqlens_q.has_value(); }
  int64_t batch() const { return packed() ? cu_seqlens_q->size(0) - 1 : q.size(0); }

  // Whether scores are more than scaled products. A scale of zero or less counts, for the plain
  // kernels take a row's maximum before they scale; and times -inf it would be NaN.
  bool full() const {
    return mask || bias || alibi_slopes || dropout_seed || softcap != 0.0 || softmax_scale < 1e-37;
  }
};

inline int64_t stride_of(const Tensor& tensor, int dimension) {
  return tensor.size(dimension) == 1 ? 0 : tensor.stride(dimension);
}

template <class T>
Matrix<const T> matrix(const Tensor& tensor) {
  return {input<T>(tensor), stride_of(tensor, 0), stride_of(tensor, 1), stride_of(tensor, 2)};
}
template <class T>
Matrix<T> output_matrix(const Tensor& tensor) {
  return {output<T>(tensor), stride_of(tensor, 0), stride_of(tensor, 1), stride_of(tensor, 2)};
}

template <class E>
Broadcast<E> broadcast(const OptionalTensor& tensor) {
  if (!tensor) return {input<E>(tensor), 0, 0, 0, 0};
  return {input<E>(tensor), stride_of(*tensor, 0), stride_of(*tensor, 1), stride_of(*tensor, 2),
          stride_of(*tensor, 3)};
}

inline bool is_float32(const OptionalTensor& tensor) {
  return tensor && tensor->scalar_type() == ScalarType::Float;
}
inline OptionalTensor only_if(bool given, const OptionalTensor& tensor) {
  return given ? tensor : OptionalTensor();
}

inline Index index(const OptionalTensor& tensor) {
  const bool wide = tensor && tensor->scalar_type() == ScalarType::Long;
  return {input<int32_t>(only_if(!wide, tensor)), input<int64_t>(only_if(wide, tensor))};
}

// Whether all rows can be read and written 16 bytes at a time, which are so many elements.
inline bool are_aligned(std::initializer_list<Tensor> tensors, int elements = 8) {
  for (const Tensor& tensor : tensors) {
    if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 != 0) return false;
    if (tensor.size(3) % elements != 0) return false;
    for (int d = 0; d < 3; ++d) {
      if (stride_of(tensor, d) % elements != 0) return false;
    }
  }
  return true;
}

// float32 holds neither the smallest and the largest doubles nor quotients by them; a cap far below
// or above all scores is as good as any other one there.
inline double held_softcap(double softcap) {
  return softcap == 0.0 ? 0.0 : std::clamp(softcap, 1e-20, 1e20);
}

inline int ceil_div(int64_t a, int b) { return static_cast<int>((a + b - 1) / b); }

// All but `tiles`, which is the kernel's, and `aligned`.
template <class T>
void set_call(AttentionParams<T>& p, const Call& call) {
  if (call.q.size(1) >= int64_t{1} << 31 || call.k.size(1) >= int64_t{1} << 31) {
    throw std::runtime_error("fastattn: the CUDA kernels of attention take less than 2^31 tokens");
  }
  p.q = matrix<T>(call.q);
  p.k = matrix<T>(call.k);
  p.v = matrix<T>(call.v);
  p.scores.scale =
      static_cast<float>(call.softcap != 0.0 ? call.softmax_scale : call.softmax_scale * log2_e);
  p.scores.softcap = static_cast<float>(held_softcap(call.softcap));
  p.scores.bias = broadcast<T>(only_if(!is_float32(call.bias), call.bias));
  p.scores.bias_float32 = broadcast<float>(only_if(is_float32(call.bias), call.bias));
  p.scores.mask = broadcast<uint8_t>(call.mask);
  p.scores.slopes = input<float>(call.alibi_slopes);
  p.scores.slopes_batch = call.alibi_slopes ? stride_of(*call.alibi_slopes, 0) : 0;
  p.scores.seed = input<int64_t>(call.dropout_seed);
  p.scores.threshold = static_cast<int>(call.threshold);
  p.scores.inverse_keep = static_cast<float>(1.0 / (1.0 - call.dropout_p));
  p.key_lengths = index(call.key_lengths);
  p.cu_seqlens_q = index(call.cu_seqlens_q);
  p.cu_seqlens_k = index(call.cu_seqlens_k);
  p.seqused_q = index(call.seqused_q);
  p.seqused_k = index(call.seqused_k);
  p.sequences = static_cast<int>(call.batch());
  p.heads = static_cast<int>(call.q.size(2));
  p.group_size = static_cast<int>(call.q.size(2) / call.k.size(2));
  p.seqlen_q = static_cast<int>(call.q.size(1));
  p.seqlen_k = static_cast<int>(call.k.size(1));
  // A side that is wider than any sequence bounds nothing.
  const auto side = [](int64_t n) { return n < 0 || n > unbounded ? unbounded : n; };
  p.low = static_cast<int>(-side(call.window_left));
  p.high = static_cast<int>(side(call.window_right));
  p.top_left = call.top_left;
  p.head_dim = static_cast<int>(call.q.size(3));
  p.head_dim_v = static_cast<int>(call.v.size(3));
  p.lse_head = p.seqlen_q;
  p.lse_batch = call.packed() ? 0 : p.lse_head * p.heads;
}

// Calls run(Width<head_dim>{}) for the instantiation that holds the call's widths.
template <int HeadDim>
struct Width {
  static constexpr int value = HeadDim;
};

template <class Run>
void for_width(const Call& call, Run run) {
  const int64_t k = call.q.size(3), v = call.v.size(3), width = k > v ? k : v;
  if (width <= 64) return run(Width<64>{});
  if (width <= 128) return run(Width<128>{});
  if (width <= 256) return run(Width<256>{});
  throw std::runtime_error("fastattn: the CUDA kernels of attention end at a head_dim of 256");
}

// The launches of one dtype and one direction, each in a file of its own.
template <class T>
void launch_forward(const Call& call, const Tensor& out, const Tensor& lse,
                    const OptionalTensor& sink, Stream stream);
template <class T>
void launch_backward(const Call& call, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                     const Tensor& delta, const Tensor& dout, const OptionalTensor& dlse,
                     const Tensor& out, const Tensor& lse, Stream stream);

}  // namespace fastattn
