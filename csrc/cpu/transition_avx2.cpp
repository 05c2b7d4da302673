// The transition's tile arithmetic for avx2.
#include "rounding.h"
#include "transition.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define SFPK_LANES 8
namespace sfpk::avx2 {
#include "transition_kernel.h"
}  // namespace sfpk::avx2
#endif
