// From the shape of a problem to the kernel: which orders, which tile.
//
//     A               B
//     depth inner     depth inner      x w of a Linear's weight
//     depth inner     extent inner     x w of a Conv1D's weight
//     extent inner    extent inner     x^T y, the gradient of a weight (forward kernel only)
//     anything else                    both by the element, in small tiles
#pragma once

#include "ffn/product.cuh"

namespace fastattn::ffn {

struct Orders {
  Order a, b;
};

template <class T, Pass pass, Order a, Order b>
void launch_in_tile(const ProductParams<T>& p, bool large, Stream stream) {
  constexpr const char* name = pass == Pass::forward ? "ffn_forward" : "ffn_backward";
  if (large) return launch_product<ProductTraits<T, LargeTile, a, b, pass>>(name, p, stream);
  launch_product<ProductTraits<T, SmallTile, a, b, pass>>(name, p, stream);
}

template <class T, Pass pass>
void launch_ordered(const ProductParams<T>& p, Orders orders, bool large, Stream stream) {
  constexpr Order depth = Order::depth_inner, extent = Order::extent_inner, any = Order::any;
  if (orders.a == depth && orders.b == depth) {
    return launch_in_tile<T, pass, depth, depth>(p, large, stream);
  }
  if (orders.a == depth && orders.b == extent) {
    return launch_in_tile<T, pass, depth, extent>(p, large, stream);
  }
  if constexpr (pass == Pass::forward) {
    if (orders.a == extent && orders.b == extent) {
      return launch_in_tile<T, pass, extent, extent>(p, large, stream);
    }
  }
  constexpr const char* name =
      pass == Pass::forward ? "ffn_forward_by_element" : "ffn_backward_by_element";
  launch_product<ProductTraits<T, SmallTile, any, any, pass>>(name, p, stream);
}

}  // namespace fastattn::ffn
