#include "selection_masks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

namespace sfpk {

namespace {

constexpr int64_t kGrain = 32;  // blocks

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bools of entries [begin, begin + count), count ≤ kBlock.
void fill(const Piece& piece, const std::vector<SegmentCut>& segments, int64_t begin, int64_t count,
          uint8_t* out) {
  const auto& kernels = selection_kernels();
  int32_t keys[kBlock];
  kernels.load_keys(piece, begin, count, keys);
  const int64_t flat = piece.first + begin;
  auto segment =
      std::upper_bound(segments.begin(), segments.end(), flat,
                       [](int64_t index, const SegmentCut& candidate) { return index < candidate.end; });
  for (int64_t e = 0; e < count;) {
    while (flat + e >= segment->end) ++segment;
    const int64_t end = std::min(count, segment->end - flat);
    const int64_t tied = std::clamp(segment->cut.tie_end - flat, e, end);
    // Keys are integers: key ≥ t is key > t - 1, and no cut with ties has the lowest key.
    kernels.compare(keys + e, tied - e, segment->cut.key - (tied > e ? 1 : 0), out + e);
    kernels.compare(keys + tied, end - tied, segment->cut.key, out + tied);
    e = end;
  }
  if (piece.always)
    for (int64_t e = 0; e < count; ++e) out[e] |= piece.always[begin + e] != 0;
}

// Bit e of `out` is bools[e]; `bytes` are written.
void pack(const uint8_t* bools, int64_t count, uint8_t* out, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; ++byte) {
    uint8_t eight[8] = {};
    const int64_t left = std::clamp<int64_t>(count - 8 * byte, 0, 8);
    std::memcpy(eight, bools + 8 * byte, static_cast<size_t>(left));
    uint8_t bits = 0;
    for (int bit = 0; bit < 8; ++bit) bits |= static_cast<uint8_t>(eight[bit] << bit);
    out[byte] = bits;
  }
}

void pack_whole(const uint8_t* bools, int64_t bytes, uint8_t* out) {
  for (int64_t byte = 0; byte < bytes; ++byte) {
    uint64_t eight;
    std::memcpy(&eight, bools + 8 * byte, 8);
    out[byte] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
}

// Lines that do not end on a unit: bools of all first, then line by line.
void write_ragged(const Piece& piece, const std::vector<SegmentCut>& segments, const MaskOutput& output,
                  int64_t unit) {
  std::vector<uint8_t> bools(static_cast<size_t>(piece.count));
  torch::stable::parallel_for(0, ceil_div(piece.count, kBlock), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin * kBlock; b < std::min(piece.count, end * kBlock); b += kBlock)
      fill(piece, segments, b, std::min(kBlock, piece.count - b), bools.data() + b);
  });
  const int64_t bytes = ceil_div(output.line, unit) * (unit / 8);
  torch::stable::parallel_for(0, piece.count / output.line,
                              std::max<int64_t>(1, kGrain * kBlock / output.line),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t line = begin; line < end; ++line)
                                  pack(bools.data() + line * output.line, output.line,
                                       static_cast<uint8_t*>(output.data) + line * bytes, bytes);
                              });
}

}  // namespace

void write_masks(const std::vector<Piece>& pieces, const std::vector<SegmentCut>& segments,
                 const std::vector<MaskOutput>& outputs, Packing packing) {
  const int64_t unit = packing == Packing::kInt32 ? 32 : 8;
  std::vector<size_t> whole;    // pieces that need no care for their lines
  std::vector<int64_t> starts;  // their first block, counted over all
  int64_t blocks = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (pieces[i].count == 0) continue;
    if (packing == Packing::kBool || pieces[i].count == outputs[i].line || outputs[i].line % unit == 0) {
      whole.push_back(i);
      starts.push_back(blocks);
      blocks += ceil_div(pieces[i].count, kBlock);
    } else {
      write_ragged(pieces[i], segments, outputs[i], unit);
    }
  }
  torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    size_t at =
        static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin()) - 1;
    for (int64_t block = begin; block < end; ++block) {
      while (at + 1 < starts.size() && block >= starts[at + 1]) ++at;
      const Piece& piece = pieces[whole[at]];
      const int64_t first = (block - starts[at]) * kBlock, count = std::min(kBlock, piece.count - first);
      auto* out = static_cast<uint8_t*>(outputs[whole[at]].data);
      if (packing == Packing::kBool) {
        fill(piece, segments, first, count, out + first);
        continue;
      }
      uint8_t bools[kBlock];
      fill(piece, segments, first, count, bools);
      if (count == kBlock)
        pack_whole(bools, kBlock / 8, out + first / 8);
      else
        pack(bools, count, out + first / 8, ceil_div(count, unit) * (unit / 8));
    }
  });
}

}  // namespace sfpk
