// The transition's tile arithmetic for avx512.
#include "rounding.h"
#include "transition.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#define SFPK_LANES 16
namespace sfpk::avx512 {
#include "transition_kernel.h"
}  // namespace sfpk::avx512
#endif
