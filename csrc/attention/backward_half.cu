#include "attention/backward_launch.cuh"

namespace fastattn {

template void launch_backward<half_t>(const Call&, const Tensor&, const Tensor&, const Tensor&,
                                    const Tensor&, const Tensor&, const OptionalTensor&,
                                    const Tensor&, const Tensor&, Stream);

}  // namespace fastattn
