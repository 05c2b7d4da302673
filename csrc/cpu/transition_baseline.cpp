// The transition's tile arithmetic for baseline.
#include "rounding.h"
#include "transition.h"

#define SFPK_LANES 4
namespace sfpk::baseline {
#include "transition_kernel.h"
}  // namespace sfpk::baseline
