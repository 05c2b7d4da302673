// The selection's block kernels for any CPU.
#include "selection.h"

#define SFPK_LANES 4
namespace sfpk::baseline {
#include "selection_kernel.h"
}  // namespace sfpk::baseline
