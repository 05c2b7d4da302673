// The launch ritual of the CUDA kernels: grids within the limits, the caller's stream, an error that names
// the kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "codes.h"

namespace sfpk::cuda {

constexpr int kThreads = 256;

// Blocks along x, rows along y.
inline dim3 grid_of(int64_t blocks, int64_t rows, const char* kernel) {
  if (blocks > INT32_MAX || rows > kMostRows)
    throw std::runtime_error(std::string(kernel) + ": wanted at most 2^31 - 1 blocks and " +
                             std::to_string(kMostRows) + " rows, got " + std::to_string(blocks) + " and " +
                             std::to_string(rows));
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(rows), 1);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + ": the launch failed: " + cudaGetErrorString(error));
}

}  // namespace sfpk::cuda

// The emulation of tests/cuda_emulation runs blocks one after the other on the CPU.
#if !defined(SFPK_LAUNCH)
#define SFPK_LAUNCH(kernel, blocks, rows, stream, ...)                                             \
  do {                                                                                             \
    if ((blocks) > 0 && (rows) > 0) {                                                              \
      kernel<<<::sfpk::cuda::grid_of(blocks, rows, #kernel), ::sfpk::cuda::kThreads, 0, stream>>>( \
          __VA_ARGS__);                                                                            \
      ::sfpk::cuda::check_launch(#kernel);                                                         \
    }                                                                                              \
  } while (false)
#endif
