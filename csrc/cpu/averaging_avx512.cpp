// Averages of gradients for avx512.
#include "averaging.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,popcnt,prefer-vector-width=512")
#define SFPK_LANES 16
namespace sfpk::avx512 {
#include "averaging_kernel.h"
}  // namespace sfpk::avx512
#endif
