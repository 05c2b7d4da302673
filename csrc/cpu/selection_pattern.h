// N:M patterns: the best N of every M consecutive entries.
#pragma once

#include <cstdint>

#include "selection.h"

namespace sfpk {

// out[e] = 1 unless entry e is a candidate among the best of its group; entries kept always take their places
// first. Returns whether a score was NaN.
bool exclude_by_pattern(const Source& source, int64_t keep, int64_t group, uint8_t* out);

}  // namespace sfpk
