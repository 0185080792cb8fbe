// The ops of the extension as torch sees them, `torch.ops.fastattn_cuda.*`: registration and
// nothing else.
//
// An op writes to tensors that Python made (fastattn/ops/*/cuda.py), "Tensor(a!)" in its schema,
// and returns nothing. It is declared in csrc/<op>/<op>.h; its fake implementation is that of all
// (fastattn/extension.py).
#include <device/tensor.cuh>  // quotes would find csrc/device in the emulator's build too

#include "attention/attention.h"
#include "attention/decode.h"
#include "ffn/ffn.h"
#include "layer_norm/layer_norm.h"

#include <string>

// setup.py and tests/emulator/library.py define FASTATTN_ARCHS, what FASTATTN_CUDA_ARCHS said, and
// FASTATTN_TOOLKIT, the version of CUDA as in CUDART_VERSION (0 for none).
namespace {

std::string built_for() { return FASTATTN_ARCHS; }
int64_t toolkit() { return FASTATTN_TOOLKIT; }

}  // namespace

STABLE_TORCH_LIBRARY(fastattn_cuda, m) {
  m.def("built_for() -> str");
  m.def("toolkit() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, CompositeExplicitAutograd, m) {
  m.impl("built_for", TORCH_BOX(&built_for));
  m.impl("toolkit", TORCH_BOX(&toolkit));
}

// --- layer_norm and rms_norm ---------------------------------------------------------------------

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn_cuda, m) {
  m.def(
      "layer_norm_forward(Tensor(a!) out, Tensor(b!)? stream, Tensor(c!) statistics, Tensor x, "
      "Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool center) -> ()");
  m.def(
      "layer_norm_backward(Tensor(a!) dx, Tensor(b!)? dresidual, Tensor(c!)? dweight, "
      "Tensor(d!)? dbias, Tensor(e!)? partials, Tensor dout, Tensor? dstream, Tensor stream, "
      "Tensor? weight, Tensor statistics, bool center) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FA_DISPATCH_KEY, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&fastattn::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&fastattn::layer_norm_backward));
}

// --- attention -----------------------------------------------------------------------------------

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

// --- attention with a key-value cache ------------------------------------------------------------

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn_cuda, m) {
  m.def(
      "append_to_cache(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths, "
      "Tensor? block_table, Tensor? rows, Tensor? rotary_cos, Tensor? rotary_sin, "
      "Tensor? k_scale, Tensor? v_scale, bool rotary_interleaved, int capacity) -> ()");
  m.def(
      "attend_to_cache(Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? part_out, Tensor(d!)? part_lse, "
      "Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table, Tensor? "
      "rows, "
      "Tensor? starts, Tensor? alibi_slopes, Tensor? sink, Tensor? rotary_cos, Tensor? rotary_sin, "
      "Tensor? k_scale, Tensor? v_scale, bool rotary_interleaved, bool rotary_advances, int capacity, int appended, "
      "int part_keys, int blocks, int window_left, int window_right, float softmax_scale, "
      "float softcap) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FA_DISPATCH_KEY, m) {
  m.impl("append_to_cache", TORCH_BOX(&fastattn::append_to_cache));
  m.impl("attend_to_cache", TORCH_BOX(&fastattn::attend_to_cache));
}

// --- ffn -----------------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn_cuda, m) {
  m.def(
      "ffn_product(Tensor(a!) out, Tensor(b!)? pre, Tensor a, Tensor b, Tensor? bias, "
      "int activation, int tile_rows) -> ()");
  m.def(
      "ffn_product_derivative(Tensor(a!) out, Tensor(b!)? activated, Tensor(c!)? sums, Tensor a, "
      "Tensor b, Tensor pre, int activation, int tile_rows) -> ()");
  m.def("ffn_column_sums(Tensor(a!) sums, Tensor matrix, int rows_per_part) -> ()");
  m.def("ffn_cublaslt_version() -> int");
  m.def(
      "ffn_cublaslt_product(Tensor(a!) out, Tensor(b!)? pre, Tensor(c!) workspace, Tensor a, "
      "Tensor b, Tensor? bias, int activation) -> bool");
  m.def(
      "ffn_cublaslt_product_derivative(Tensor(a!) out, Tensor(b!)? bias_gradient, "
      "Tensor(c!) workspace, Tensor a, Tensor b, Tensor pre) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, CompositeExplicitAutograd, m) {
  m.impl("ffn_cublaslt_version", TORCH_BOX(&fastattn::ffn::cublaslt_version));
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FA_DISPATCH_KEY, m) {
  m.impl("ffn_product", TORCH_BOX(&fastattn::ffn::product));
  m.impl("ffn_product_derivative", TORCH_BOX(&fastattn::ffn::product_derivative));
  m.impl("ffn_column_sums", TORCH_BOX(&fastattn::ffn::column_sums));
  m.impl("ffn_cublaslt_product", TORCH_BOX(&fastattn::ffn::cublaslt_product));
  m.impl("ffn_cublaslt_product_derivative", TORCH_BOX(&fastattn::ffn::cublaslt_product_derivative));
}
