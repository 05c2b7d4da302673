// Averages of gradients for any CPU.
#include "averaging.h"

#define SFPK_LANES 4
namespace sfpk::baseline {
#include "averaging_kernel.h"
}  // namespace sfpk::baseline
