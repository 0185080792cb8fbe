// The kernels of decode.cu for one dtype.
#include "attention/decode_launch.cuh"

namespace fastattn {

template void decode_of<bfloat16_t, bfloat16_t>(const DecodeCall&);

}  // namespace fastattn
