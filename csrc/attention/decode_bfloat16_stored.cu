// The kernels of decode.cu for one dtype and caches of 8-bit numbers.
#include "attention/decode_launch.cuh"

namespace fastattn {

template void decode_of<bfloat16_t, int8_t>(const DecodeCall&);
template void decode_of<bfloat16_t, e4m3_t>(const DecodeCall&);

}  // namespace fastattn
