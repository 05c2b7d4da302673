// The block kernels of masked weights for any CPU.
#include "masked_weights.h"

#define SFPK_LANES 4
namespace sfpk::baseline {
#include "masked_weights_kernel.h"
}  // namespace sfpk::baseline
