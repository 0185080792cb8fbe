#include <string>

#include "device/tensor.cuh"
#include "ffn/dispatch.cuh"

namespace fastattn::ffn {

// Compiled in files of their own.
extern template void launch_ordered<half_t, Pass::forward>(const ProductParams<half_t>&, Orders,
                                                           bool, Stream);
extern template void launch_ordered<half_t, Pass::backward>(const ProductParams<half_t>&, Orders,
                                                            bool, Stream);
extern template void launch_ordered<bfloat16_t, Pass::forward>(const ProductParams<bfloat16_t>&,
                                                               Orders, bool, Stream);
extern template void launch_ordered<bfloat16_t, Pass::backward>(const ProductParams<bfloat16_t>&,
                                                                Orders, bool, Stream);

namespace {

using torch::headeronly::ScalarType;

bool aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
}

// Whether a matrix is contiguous along a dimension, in whole and aligned 16 bytes.
bool inner(const Tensor& matrix, int dim) {
  const int64_t size = matrix.size(dim), others = matrix.size(1 - dim);
  return size % 8 == 0 && (size == 0 || matrix.stride(dim) == 1) &&
         (others <= 1 || matrix.stride(1 - dim) % 8 == 0) && aligned(matrix);
}

Order order_of(const Tensor& matrix, int depth) {
  if (inner(matrix, depth)) return Order::depth_inner;
  return inner(matrix, 1 - depth) ? Order::extent_inner : Order::any;
}

// A size as the kernels count it, up to a tile beyond the last.
int size(const Tensor& matrix, int dim) {
  constexpr int64_t largest = (int64_t{1} << 31) - 1 - LargeTile::rows;
  if (matrix.size(dim) > largest) {
    throw std::runtime_error("fastattn: a size of an ffn product is above " +
                             std::to_string(largest));
  }
  return static_cast<int>(matrix.size(dim));
}

template <class T>
Operand<T> operand(const Tensor& matrix, int depth) {
  // The stride of a single row or column may be anything.
  auto stride = [&](int dim) { return matrix.size(dim) <= 1 ? 0 : matrix.stride(dim); };
  const int extent = 1 - depth;
  return {input<T>(matrix), size(matrix, extent), size(matrix, depth), stride(extent),
          stride(depth)};
}

template <class T>
ProductParams<T> params_of(const Tensor& out, const std::optional<Tensor>& other, const Tensor& a,
                           const Tensor& b, int64_t activation) {
  ProductParams<T> p{};
  p.a = operand<T>(a, 1);
  p.b = operand<T>(b, 0);
  p.m = p.a.extent;
  p.n = p.b.extent;
  p.k = p.a.depth;
  if (p.k != p.b.depth || out.size(0) != p.m || out.size(1) != p.n) {
    throw std::runtime_error("fastattn: the shapes of an ffn product do not fit");
  }
  p.out = output<T>(out);
  p.other = output<T>(other);
  p.activation = static_cast<Activation>(activation);
  p.vectors = p.n % 8 == 0 && aligned(out) && (!other || aligned(*other));
  return p;
}

template <class T>
void forward(const Tensor& out, const std::optional<Tensor>& pre, const Tensor& a, const Tensor& b,
             const std::optional<Tensor>& bias, int64_t activation, int64_t tile_rows) {
  auto p = params_of<T>(out, pre, a, b, activation);
  p.bias = input<T>(bias);
  p.bias_stride = bias ? bias->stride(0) : 0;
  const OnDevice on(out);
  launch_ordered<T, Pass::forward>(p, {order_of(a, 1), order_of(b, 0)},
                                   tile_rows == LargeTile::rows, on.stream());
}

template <class T>
void backward(const Tensor& out, const std::optional<Tensor>& activated,
              const std::optional<Tensor>& sums, const Tensor& a, const Tensor& b,
              const Tensor& pre, int64_t activation, int64_t tile_rows) {
  auto p = params_of<T>(out, activated, a, b, activation);
  p.pre = input<T>(pre);
  p.vectors = p.vectors && aligned(pre);
  p.sums = output<float>(sums);
  const OnDevice on(out);
  launch_ordered<T, Pass::backward>(p, {order_of(a, 1), order_of(b, 0)},
                                    tile_rows == LargeTile::rows, on.stream());
}

}  // namespace

// out = activation(a b + bias), and pre = a b + bias if there is such a tensor: a (m, k), b (k, n),
// bias (n,), out and pre (m, n). `tile_rows` is 128 or 64; operands that are read by the element
// take 64.
void product(Tensor out, std::optional<Tensor> pre, Tensor a, Tensor b, std::optional<Tensor> bias,
             int64_t activation, int64_t tile_rows) {
  if (out.scalar_type() == ScalarType::Half) {
    return forward<half_t>(out, pre, a, b, bias, activation, tile_rows);
  }
  forward<bfloat16_t>(out, pre, a, b, bias, activation, tile_rows);
}

// out = (a b) activation'(pre), and activated = activation(pre), and sums = the column sums of out
// over every 32 rows (the last may be fewer), if there are such tensors: a (m, k), b (k, n), the
// others (m, n), sums (m / 32 rounded up, n) in float32.
void product_derivative(Tensor out, std::optional<Tensor> activated, std::optional<Tensor> sums,
                        Tensor a, Tensor b, Tensor pre, int64_t activation, int64_t tile_rows) {
  if (out.scalar_type() == ScalarType::Half) {
    return backward<half_t>(out, activated, sums, a, b, pre, activation, tile_rows);
  }
  backward<bfloat16_t>(out, activated, sums, a, b, pre, activation, tile_rows);
}

}  // namespace fastattn::ffn

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn_cuda, m) {
  m.def(
      "ffn_product(Tensor(a!) out, Tensor(b!)? pre, Tensor a, Tensor b, Tensor? bias, "
      "int activation, int tile_rows) -> ()");
  m.def(
      "ffn_product_derivative(Tensor(a!) out, Tensor(b!)? activated, Tensor(c!)? sums, Tensor a, "
      "Tensor b, Tensor pre, int activation, int tile_rows) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FA_DISPATCH_KEY, m) {
  m.impl("ffn_product", TORCH_BOX(&fastattn::ffn::product));
  m.impl("ffn_product_derivative", TORCH_BOX(&fastattn::ffn::product_derivative));
}
