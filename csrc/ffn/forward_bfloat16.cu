#include "ffn/dispatch.cuh"

namespace fastattn::ffn {

template void launch_ordered<bfloat16_t, Pass::forward>(const ProductParams<bfloat16_t>&, Orders,
                                                        bool, Stream);

}  // namespace fastattn::ffn
