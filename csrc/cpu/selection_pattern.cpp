#include "selection_pattern.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

namespace sfpk {

namespace {

constexpr int64_t kSmallGroup = 32;  // ranked by comparing all pairs

void exclude_small(const int32_t* keys, int64_t places, int64_t group, uint8_t* out) {
  for (int64_t e = 0; e < group; ++e) {
    int64_t before = 0;
    for (int64_t other = 0; other < group; ++other)
      before += keys[other] > keys[e] || (keys[other] == keys[e] && other < e);
    out[e] = keys[e] == kNotCandidate || before >= places;
  }
}

void exclude_large(const int32_t* keys, int64_t places, int64_t group, std::vector<int64_t>& order,
                   uint8_t* out) {
  order.resize(static_cast<size_t>(group));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
  for (int64_t place = 0; place < group; ++place)
    out[order[place]] = keys[order[place]] == kNotCandidate || place >= places;
}

}  // namespace

bool exclude_by_pattern(const Source& source, int64_t keep, int64_t group, uint8_t* out) {
  const int64_t grain = std::max<int64_t>(1, 32 * kBlock / group);
  std::atomic<bool> nan{false};
  torch::stable::parallel_for(0, source.count / group, grain, [&](int64_t begin, int64_t end) {
    const int64_t at_once = std::max<int64_t>(1, kBlock / group);
    std::vector<int32_t> keys(static_cast<size_t>(at_once * group));
    std::vector<int64_t> order;
    bool bad = false;
    for (int64_t g = begin; g < end; g += at_once) {
      const int64_t first = g * group, count = std::min(at_once, end - g) * group;
      for (int64_t b = 0; b < count; b += kBlock)
        bad |= selection_kernels().load_keys(source, first + b, std::min(kBlock, count - b), &keys[b]);
      for (int64_t b = 0; b < count; b += group) {
        int64_t places = keep;
        if (source.always)
          for (int64_t e = 0; e < group; ++e) places -= source.always[first + b + e] != 0;
        if (group <= kSmallGroup)
          exclude_small(&keys[b], places, group, out + first + b);
        else
          exclude_large(&keys[b], places, group, order, out + first + b);
      }
    }
    if (bad) nan = true;
  });
  return nan;
}

}  // namespace sfpk
