// How a kernel is written down, and where one of its threads stands.
//
// Kernels are plain C++ over the headers of this folder. nvcc compiles them with these; g++
// compiles the same sources with the headers of the same names in csrc/emulator/device, which run a
// grid on the CPU and look for bugs. So nothing outside this folder is CUDA's: no PTX, no builtin
// variable, no intrinsic, no dereferenced pointer.
#pragma once

#include <cstdint>

// FA_KERNEL(256, 2) void f(FA_PARAMS(Params) p): blocks of at most 256 threads, 2 of them on an SM.
#define FA_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
// A kernel's one argument, which stays in constant memory.
#define FA_PARAMS(type) const __grid_constant__ type
// A function of a kernel, always inlined; a function of host and kernel.
#define FA_DEVICE __device__ __forceinline__
#define FA_HOST_DEVICE __host__ __device__ __forceinline__
#define FA_UNROLL _Pragma("unroll")
#define FA_ROLL _Pragma("unroll 1")

namespace fastattn {

constexpr int warp_threads = 32;

FA_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FA_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
FA_DEVICE int warp_index() { return thread_index() / warp_threads; }
FA_DEVICE int lane_index() { return thread_index() % warp_threads; }

FA_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
FA_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
FA_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
FA_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
FA_DEVICE int grid_y() { return static_cast<int>(gridDim.y); }
FA_DEVICE int grid_z() { return static_cast<int>(gridDim.z); }

}  // namespace fastattn
