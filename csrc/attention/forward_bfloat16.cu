#include "attention/forward_launch.cuh"

namespace fastattn {

template void launch_forward<bfloat16_t>(const Call&, const Tensor&, const Tensor&,
                                   const OptionalTensor&, Stream);

}  // namespace fastattn
