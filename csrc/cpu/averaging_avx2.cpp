// Averages of gradients for avx2.
#include "averaging.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c,popcnt")
#define SFPK_LANES 8
namespace sfpk::avx2 {
#include "averaging_kernel.h"
}  // namespace sfpk::avx2
#endif
