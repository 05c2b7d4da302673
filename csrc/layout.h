// Layouts as the ops receive them: which weights each coordinate governs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "piece.h"
#include "received.h"

namespace sfpk {

// The pieces of contiguous `weights`; `layout` has outer, groups, inner and first of each. The coordinates of
// different pieces may be the same ones, all within [0, coordinates).
inline std::vector<Piece> pieces_of(const std::vector<torch::stable::Tensor>& weights,
                                    const std::vector<int64_t>& layout, int64_t coordinates, const char* op) {
  SFPK_CHECK(!weights.empty() && layout.size() == 4 * weights.size(), op, "layout", 4 * weights.size(),
             layout.size(), " numbers, four a tensor of weights");
  std::vector<Piece> pieces;
  for (size_t p = 0; p < weights.size(); ++p) {
    const auto& w = weights[p];
    const Piece piece{w.const_data_ptr(), kind_of(w, op, "weights"), layout[4 * p],
                      layout[4 * p + 1],  layout[4 * p + 2],         layout[4 * p + 3]};
    SFPK_CHECK(w.is_contiguous() && w.numel() == piece.count(), op, "weights", piece.count(), w.numel(),
               " contiguous weights");
    SFPK_CHECK(piece.groups >= 0 && piece.first >= 0 && piece.groups <= coordinates - piece.first, op,
               "layout", "coordinates from 0 to " + std::to_string(coordinates), piece.first, " to ",
               piece.first + piece.groups);
    pieces.push_back(piece);
  }
  return pieces;
}

// Whether a coordinate has weights in more than one piece.
inline bool shares_coordinates(const std::vector<Piece>& pieces) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (const Piece& piece : pieces)
    if (piece.groups > 0) ranges.emplace_back(piece.first, piece.first + piece.groups);
  std::sort(ranges.begin(), ranges.end());
  for (size_t r = 1; r < ranges.size(); ++r)
    if (ranges[r].first < ranges[r - 1].second) return true;
  return false;
}

}  // namespace sfpk
