#include "ffn/dispatch.cuh"

namespace fastattn::ffn {

template void launch_ordered<half_t, Pass::backward>(const ProductParams<half_t>&, Orders,
                                                     bool, Stream);

}  // namespace fastattn::ffn
