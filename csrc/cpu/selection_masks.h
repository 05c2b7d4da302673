// From cuts to masks: bool, or bits packed along the last dimension.
#pragma once

#include <cstdint>
#include <vector>

#include "codes.h"
#include "selection_ranking.h"

namespace sfpk {

struct SegmentCut {
  int64_t end;  // flat index
  KeyCut cut;
};

struct MaskOutput {
  void* data;
  int64_t line;  // entries of the last dimension
};

// Bools of entries [begin, begin + count) of a source, count ≤ kBlock; segments in rising order. A NaN score
// is not kept.
void keep_of(const Source& source, const std::vector<SegmentCut>& segments, int64_t begin, int64_t count,
             uint8_t* out);

// The mask of every source to its output; segments in rising order.
void write_masks(const std::vector<Source>& sources, const std::vector<SegmentCut>& segments,
                 const std::vector<MaskOutput>& outputs, Packing packing);

}  // namespace sfpk
