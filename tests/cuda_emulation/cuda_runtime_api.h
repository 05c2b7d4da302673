// What the kernels' sources take from CUDA, on the CPU: blocks one after the other, a block's threads as fibers that
// change places at barriers. Stands in for CUDA's own header.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned a, unsigned b, unsigned c) : x(a), y(b), z(c) {}
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

inline dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0};

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
inline float __fmul_rn(float a, float b) { return a * b; }
using std::isfinite;

namespace emulation {

constexpr unsigned kThreads = 256;
constexpr size_t kStack = 1 << 16;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool live = false;
};
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers(kThreads);
inline const std::function<void()>* body = nullptr;

inline void run_fiber() {
  (*body)();
  fibers[threadIdx.x].live = false;
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

inline void run_block(const std::function<void()>& kernel) {
  body = &kernel;
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    fiber.live = true;
  }
  for (bool any = true; any;) {
    any = false;
    for (unsigned t = 0; t < kThreads; ++t) {
      if (!fibers[t].live) continue;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibers[t].context);
      any |= fibers[t].live;
    }
  }
}

// Only the last blocks of every launch are run, 0 for all: what lies before is then as if it were not there.
inline int64_t window = 0;

inline void launch(int64_t blocks, int64_t rows, const std::function<void()>& kernel) {
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t x = window > 0 && window < blocks ? blocks - window : 0; x < blocks; ++x) {
      blockIdx.x = static_cast<unsigned>(x);
      blockIdx.y = static_cast<unsigned>(y);
      run_block(kernel);
    }
}

}  // namespace emulation

inline void __syncthreads() {
  const unsigned self = threadIdx.x;
  swapcontext(&emulation::fibers[self].context, &emulation::scheduler);
}

#define SFPK_LAUNCH(kernel, blocks, rows, stream, ...) \
  emulation::launch(blocks, rows, [&] { kernel(__VA_ARGS__); })
