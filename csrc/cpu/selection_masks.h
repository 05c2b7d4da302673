// From cuts to masks: bool, or bits packed along the last dimension.
#pragma once

#include <cstdint>
#include <vector>

#include "selection_ranking.h"

namespace sfpk {

enum class Packing { kNone = -1, kBool = 0, kUint8 = 1, kInt32 = 2 };

struct SegmentCut {
  int64_t end;  // flat index
  KeyCut cut;
};

struct MaskOutput {
  void* data;
  int64_t line;  // entries of the last dimension
};

// The mask of every piece to its output; segments in rising order.
void write_masks(const std::vector<Piece>& pieces, const std::vector<SegmentCut>& segments,
                 const std::vector<MaskOutput>& outputs, Packing packing);

}  // namespace sfpk
