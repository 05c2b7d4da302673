// Cuts of a ranking in segments with floors and ceilings, and sources cut at segment borders.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "selection_ranking.h"

namespace sfpk {

struct Segment {
  int64_t begin, end;        // flat indices
  int64_t floor, cap, free;  // candidates to keep, at least and at most; candidates there are
  std::optional<float> guess;
};

// The parts of `sources` with flat index in [begin, end).
std::vector<Source> slice(const std::vector<Source>& sources, int64_t begin, int64_t end);

// One cut per segment, the k best of the whole ranking under floor ≤ kept ≤ cap. The caller has checked that
// k lies between the sums of both. `nan_at` becomes the flat index of a source with a NaN score.
std::vector<KeyCut> cut_segments(const std::vector<Source>& sources, const std::vector<Segment>& segments,
                                 int64_t k, int64_t& nan_at);

}  // namespace sfpk
