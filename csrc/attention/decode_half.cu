// The kernels of decode.cu for one dtype.
#include "attention/decode_launch.cuh"

namespace fastattn {

template void decode_of<half_t, half_t>(const DecodeCall&);

}  // namespace fastattn
