// Sizes of what Python allocates for the selection on the device, where they stand in ops/codes.py.
#pragma once

#include <cstdint>

#include "selection_keys.h"

namespace sfpk::cuda {

constexpr int64_t kChunk = 1 << 14;       // entries whose ties are counted together
constexpr int64_t kStateColumns = 8;      // int64 per ranking
constexpr int64_t kCounters = kBins + 1;  // of a histogram: bins, and keys above them

}  // namespace sfpk::cuda
