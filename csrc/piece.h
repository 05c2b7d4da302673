// A piece of a layout, as host and device kernels take it.
#pragma once

#include <cstdint>

#include "codes.h"
#include "host_device.h"

namespace sfpk {

// Weights seen as (outer, groups, inner), governed by the coordinates [first, first + groups): coordinate
// first + g governs all of [:, g, :].
struct Piece {
  const void* weights;
  FloatKind kind;
  int64_t outer, groups, inner, first;
  SFPK_HD int64_t count() const { return outer * groups * inner; }
  SFPK_HD bool single() const { return outer * inner == 1; }
};

}  // namespace sfpk
