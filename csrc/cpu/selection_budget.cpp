// Where to cut a ranking for a weight budget.
#include <algorithm>
#include <numeric>
#include <vector>

#include "selection_ranking.h"

namespace sfpk {

KeyCut Ranking::budget_cut(int64_t budget) {
  int32_t low = kLowestKey, high = kInfinityKey;
  int64_t left = budget;
  for (bool last = false; !last; last = low == high) {
    const auto bins = histogram(low, high, true);
    if (nan_source_ >= 0) return kKeepNone;
    ++left;  // the first key at which the sum exceeds the budget
    if (std::accumulate(bins.begin(), bins.end(), int64_t{0}) < left) return kKeepAll;
    narrow(bins, left, low, high);
    --left;
  }
  // Keys above `low` fit and those equal to it do not, not all of them: take the first ones.
  int64_t tie_end = 0;
  int32_t next = kInfinityKey;  // the smallest key above
  bool any = false, full = false;
  int32_t keys[kBlock];
  for (const Chunk& chunk : chunks_) {
    const Source& source = sources_[chunk.source];
    for (int64_t b = 0; b < chunk.count && !(full && tie_end > 0); b += kBlock) {
      const int64_t count = std::min(kBlock, chunk.count - b);
      selection_kernels().load_keys(source, chunk.begin + b, count, keys);
      for (int64_t e = 0; e < count; ++e) {
        any |= keys[e] > low;
        if (keys[e] > low) next = std::min(next, keys[e]);
        if (keys[e] != low || full) continue;
        left -= source.sizes[chunk.begin + b + e];
        full = left < 0;
        if (!full) tie_end = first(chunk) + b + e + 1;
      }
    }
  }
  if (tie_end > 0) return {low, tie_end};
  return any ? KeyCut{next, kAllTies} : kKeepNone;
}

}  // namespace sfpk
