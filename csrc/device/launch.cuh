// The host's side: a launch, and its errors with the kernel's name, grid and shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <stdexcept>
#include <string>

namespace fastattn {

using Stream = cudaStream_t;

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

inline void check_launch(cudaError_t error, const char* name, Grid grid, int threads, int shared) {
  if (error == cudaSuccess) return;
  char text[512];
  std::snprintf(text, sizeof text,
                "fastattn: kernel %s with a grid of %lld x %lld x %lld blocks of %d threads and %d "
                "bytes of shared memory: %s (%s)",
                name, static_cast<long long>(grid.x), static_cast<long long>(grid.y),
                static_cast<long long>(grid.z), threads, shared, cudaGetErrorString(error),
                cudaGetErrorName(error));
  throw std::runtime_error(text);
}

// Launches kernel(params) on a stream of the current device. x of the grid may reach 2^31 - 1, y
// and z 65535; an empty grid launches nothing. Throws std::runtime_error when CUDA refuses the
// launch.
template <class Params>
void launch(void (*kernel)(Params), const char* name, Grid grid, int threads, int shared,
            Stream stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr int shared_without_asking = 48 * 1024;
  // dim3 has 32 bits: of a grid that they do not hold, a part would run.
  constexpr int64_t most_x = (int64_t{1} << 31) - 1, most_yz = 65535;
  const bool fits = grid.x <= most_x && grid.y <= most_yz && grid.z <= most_yz;
  check_launch(fits ? cudaSuccess : cudaErrorInvalidConfiguration, name, grid, threads, shared);
  cudaGetLastError();  // of somebody else
  if (shared > shared_without_asking) {
    check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
                 name, grid, threads, shared);
  }
  kernel<<<dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                static_cast<unsigned>(grid.z)),
           threads, shared, stream>>>(params);
  check_launch(cudaGetLastError(), name, grid, threads, shared);
}

}  // namespace fastattn
