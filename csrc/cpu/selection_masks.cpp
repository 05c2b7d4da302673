#include "selection_masks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "bits.h"
#include "integers.h"

namespace sfpk {

namespace {

constexpr int64_t kGrain = 32;  // blocks

}  // namespace

void keep_of(const Source& source, const std::vector<SegmentCut>& segments, int64_t begin, int64_t count,
             uint8_t* out) {
  const auto& kernels = selection_kernels();
  int32_t keys[kBlock];
  if (kernels.load_keys(source, begin, count, keys))
    for (int64_t e = 0; e < count; ++e) keys[e] = is_nan_key(keys[e]) ? kNotCandidate : keys[e];
  const int64_t flat = source.first + begin;
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
  if (source.always)
    for (int64_t e = 0; e < count; ++e) out[e] |= source.always[begin + e] != 0;
}

namespace {

// Lines that do not end on a unit: bools of all first, then line by line.
void write_ragged(const Source& source, const std::vector<SegmentCut>& segments, const MaskOutput& output,
                  int64_t unit) {
  std::vector<uint8_t> bools(static_cast<size_t>(source.count));
  torch::stable::parallel_for(0, ceil_div(source.count, kBlock), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin * kBlock; b < std::min(source.count, end * kBlock); b += kBlock)
      keep_of(source, segments, b, std::min(kBlock, source.count - b), bools.data() + b);
  });
  const int64_t bytes = ceil_div(output.line, unit) * (unit / 8);
  torch::stable::parallel_for(0, source.count / output.line,
                              std::max<int64_t>(1, kGrain * kBlock / output.line),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t line = begin; line < end; ++line)
                                  pack_bits(bools.data() + line * output.line, output.line,
                                            static_cast<uint8_t*>(output.data) + line * bytes, bytes);
                              });
}

}  // namespace

void write_masks(const std::vector<Source>& sources, const std::vector<SegmentCut>& segments,
                 const std::vector<MaskOutput>& outputs, Packing packing) {
  const int64_t unit = unit_of(packing);
  std::vector<size_t> whole;    // sources that need no care for their lines
  std::vector<int64_t> starts;  // their first block, counted over all
  int64_t blocks = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    if (sources[i].count == 0) continue;
    if (packing == Packing::kBool || sources[i].count == outputs[i].line || outputs[i].line % unit == 0) {
      whole.push_back(i);
      starts.push_back(blocks);
      blocks += ceil_div(sources[i].count, kBlock);
    } else {
      write_ragged(sources[i], segments, outputs[i], unit);
    }
  }
  torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    size_t at =
        static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin()) - 1;
    for (int64_t block = begin; block < end; ++block) {
      while (at + 1 < starts.size() && block >= starts[at + 1]) ++at;
      const Source& source = sources[whole[at]];
      const int64_t first = (block - starts[at]) * kBlock, count = std::min(kBlock, source.count - first);
      auto* out = static_cast<uint8_t*>(outputs[whole[at]].data);
      if (packing == Packing::kBool) {
        keep_of(source, segments, first, count, out + first);
        continue;
      }
      uint8_t bools[kBlock];
      keep_of(source, segments, first, count, bools);
      pack_bits(bools, count, out + first / 8, ceil_div(count, unit) * (unit / 8));
    }
  });
}

}  // namespace sfpk
