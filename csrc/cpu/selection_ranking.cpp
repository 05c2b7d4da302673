// Exact selection in about one read of the scores.
//
// A sample (or the caller's guess) gives a narrow bracket of keys that should hold the cut; one pass counts
// the keys above it and compacts the few inside, among which the cut is settled exactly. The counts prove
// where the cut lies, so a wrong bracket costs further passes, never the result. Where a bracket holds too
// many keys (few distinct scores), a single key is tried, then histograms of 2,048 bins.
//
// Chunks are worked on by any number of threads; only counts and lists in chunk order leave them.
#include "selection_ranking.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <mutex>
#include <numeric>

#include "integers.h"

namespace sfpk {

namespace {

constexpr int64_t kChunk = 32 * kBlock;
constexpr int64_t kSampleRun = 8;  // neighbours share a cache line
constexpr int64_t kSmall = 1 << 14;
constexpr double kSigmas = 4.0;
constexpr int64_t kSmallSample = 1 << 12, kLargeSample = 1 << 16;
constexpr int64_t kGuessedSample = 512;  // beside a guess, which it only confirms
constexpr int kTries = 3;
constexpr int64_t kCrowded = 8;        // brackets with more than 1/8 of the sample are not compacted
constexpr int64_t kMostCompacted = 6;  // nor more than 1/6 of all keys
constexpr size_t kFew = 1 << 12;       // keys among which the cut is settled at once

// The smallest and largest key within the guess's margin.
std::pair<int32_t, int32_t> around(float guess) {
  const float margin = std::fabs(guess) * kGuessMargin;
  return {key_from_float(guess - margin), key_from_float(guess + margin)};
}

int64_t sum(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

int64_t narrow(const std::vector<int64_t>& bins, int64_t& wanted, int32_t& low, int32_t& high) {
  const int shift = bin_shift(low, high);
  int64_t bin = kBins - 1;
  for (; bin > 0 && bins[bin] < wanted; --bin) wanted -= bins[bin];
  const int64_t begin = low + (bin << shift), end = low + ((bin + 1) << shift) - 1;
  high = static_cast<int32_t>(std::min<int64_t>(high, end));
  low = static_cast<int32_t>(begin);
  return bins[bin];
}

// The outcome of one pass for keys in [low, high], per chunk.
struct Ranking::Scan {
  std::vector<int64_t> above, inside;
  std::vector<std::vector<int32_t>> lists;  // the keys inside, in order
  bool complete = false;                    // whether the lists hold them all
};

Ranking::Ranking(std::vector<Source> sources) : sources_(std::move(sources)) {
  for (size_t i = 0; i < sources_.size(); ++i) {
    for (int64_t begin = 0; begin < sources_[i].count; begin += kChunk)
      chunks_.push_back(
          {static_cast<int64_t>(i), begin, std::min(kChunk, sources_[i].count - begin), total_ + begin});
    total_ += sources_[i].count;
  }
}

int64_t Ranking::most_compacted() const { return std::max(kSmall, total_ / kMostCompacted); }

void Ranking::note_nan(const std::vector<uint8_t>& nan_chunks) {
  for (size_t c = 0; c < nan_chunks.size() && nan_source_ < 0; ++c)
    if (nan_chunks[c]) nan_source_ = chunks_[c].source;
}

Ranking::Scan Ranking::scan(int32_t low, int32_t high, bool compact) {
  const auto& kernels = selection_kernels();
  const int64_t chunks = static_cast<int64_t>(chunks_.size());
  const int64_t most = most_compacted();
  Scan result;
  result.above.resize(chunks);
  result.inside.resize(chunks);
  result.lists.resize(compact ? chunks : 0);
  std::vector<uint8_t> nan(chunks);
  std::atomic<int64_t> compacted{0};
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> found(compact ? kChunk + kScanSlack : 0);
    int32_t keys[kBlock];
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = chunks_[c];
      int32_t* out = compact && compacted.load(std::memory_order_relaxed) <= most ? found.data() : nullptr;
      int64_t above = 0, inside = 0;
      bool bad = false;
      for (int64_t b = 0; b < chunk.count; b += kBlock) {
        const int64_t count = std::min(kBlock, chunk.count - b);
        bad |= kernels.load_keys(sources_[chunk.source], chunk.begin + b, count, keys);
        const ScanCounts counts = kernels.scan(keys, count, low, high, out ? out + inside : nullptr);
        above += counts.above;
        inside += counts.inside;
      }
      result.above[c] = above;
      result.inside[c] = inside;
      nan[c] = bad;
      if (out) result.lists[c].assign(out, out + inside);
      compacted.fetch_add(inside, std::memory_order_relaxed);
    }
  });
  note_nan(nan);
  result.complete = compact && compacted.load() <= most;
  return result;
}

// About `wanted` keys, spread evenly with a fixed jitter; those of no candidates are among them.
std::vector<int32_t> Ranking::sample(int64_t wanted) const {
  const int64_t runs = ceil_div(wanted, kSampleRun);
  std::vector<int32_t> keys(runs * kSampleRun);
  torch::stable::parallel_for(0, runs, 256, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t low = run * total_ / runs, high = (run + 1) * total_ / runs;
      const int64_t at = low + static_cast<int64_t>(mixed(run) % static_cast<uint64_t>(high - low));
      const auto after = std::upper_bound(chunks_.begin(), chunks_.end(), at,
                                          [](int64_t place, const Chunk& c) { return place < c.place; });
      const Chunk& chunk = *(after - 1);
      const int64_t count = std::min(kSampleRun, chunk.count);
      const int64_t from = std::min(at - chunk.place, chunk.count - count);
      int32_t* out = &keys[run * kSampleRun];
      selection_kernels().load_keys(sources_[chunk.source], chunk.begin + from, count, out);
      for (int64_t e = count; e < kSampleRun; ++e) out[e] = out[e - count];
    }
  });
  return keys;
}

// Per bin of [low, high]: how many keys, or the sum of their sizes.
std::vector<int64_t> Ranking::histogram(int32_t low, int32_t high, bool sizes) {
  const auto& kernels = selection_kernels();
  const int shift = bin_shift(low, high);
  const int64_t chunks = static_cast<int64_t>(chunks_.size());
  std::vector<int64_t> total(kBins);
  std::vector<uint8_t> nan(chunks);
  std::mutex mutex;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> bins(kBins);
    int32_t keys[kBlock];
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = chunks_[c];
      const Source& source = sources_[chunk.source];
      for (int64_t b = 0; b < chunk.count; b += kBlock) {
        const int64_t count = std::min(kBlock, chunk.count - b);
        nan[c] |= kernels.load_keys(source, chunk.begin + b, count, keys);
        const int64_t* size = sizes ? source.sizes + chunk.begin + b : nullptr;
        for (int64_t e = 0; e < count; ++e)
          if (keys[e] >= low && keys[e] <= high) bins[key_bin(keys[e], low, shift)] += size ? size[e] : 1;
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (int b = 0; b < kBins; ++b) total[b] += bins[b];
  });
  note_nan(nan);
  return total;
}

// The cut among the keys equal to `key`, of which the first `wanted` ≥ 1 are kept; `equals` per chunk.
KeyCut Ranking::cut_ties(int32_t key, int64_t wanted, const std::vector<int64_t>& equals) const {
  if (sum(equals) <= wanted) return {key, kAllTies};
  size_t at = 0;
  for (; equals[at] < wanted; ++at) wanted -= equals[at];
  const Chunk& chunk = chunks_[at];
  int32_t keys[kBlock];
  for (int64_t b = 0;; b += kBlock) {
    const int64_t count = std::min(kBlock, chunk.count - b);
    selection_kernels().load_keys(sources_[chunk.source], chunk.begin + b, count, keys);
    for (int64_t e = 0; e < count; ++e)
      if (keys[e] == key && --wanted == 0) return {key, first(chunk) + b + e + 1};
  }
}

// The cut after k coordinates, known to lie among the compacted keys of [low, high].
KeyCut Ranking::settle(const Scan& scanned, int64_t k, int32_t low, int32_t high) const {
  int64_t wanted = k - sum(scanned.above);
  std::vector<int32_t> keys;
  keys.reserve(sum(scanned.inside));
  for (const auto& list : scanned.lists) keys.insert(keys.end(), list.begin(), list.end());
  while (keys.size() > kFew && low < high) {
    const int shift = bin_shift(low, high);
    std::vector<int64_t> bins(kBins);
    for (const int32_t key : keys) ++bins[key_bin(key, low, shift)];
    narrow(bins, wanted, low, high);
    size_t size = 0;
    for (const int32_t key : keys) {
      keys[size] = key;
      size += key >= low && key <= high;
    }
    keys.resize(size);
  }
  const auto last = keys.begin() + (wanted - 1);
  std::nth_element(keys.begin(), last, keys.end(), std::greater<int32_t>());
  const int32_t key = *last;
  for (const int32_t other : keys) wanted -= other > key;
  std::vector<int64_t> equals;
  equals.reserve(scanned.lists.size());
  for (const auto& list : scanned.lists) equals.push_back(std::count(list.begin(), list.end(), key));
  return cut_ties(key, wanted, equals);
}

// Narrows `known` to where a sample puts the k-th key. Returns whether only few keys should lie there; where
// a sampled key is too frequent for that, it is what `known` is narrowed to.
bool Ranking::choose_bracket(std::vector<int32_t>& sample, int64_t k, Bracket& known) const {
  const auto size = static_cast<double>(sample.size());
  const double share = static_cast<double>(k) / static_cast<double>(total_);
  const double position = share * size;
  const double margin = kSigmas * std::sqrt(position * (1.0 - share)) + 2.0 * kSampleRun;
  const auto at = [](std::vector<int32_t>& keys, double place) {
    const auto last = static_cast<double>(keys.size() - 1);
    const auto nth = keys.begin() + static_cast<int64_t>(std::clamp(place, 0.0, last));
    std::nth_element(keys.begin(), nth, keys.end(), std::greater<int32_t>());
    return *nth;
  };
  int32_t low = known.low, high = known.high;
  if (position >= margin) high = std::min(high, at(sample, position - margin));
  if (position + margin < size) low = std::max(low, at(sample, position + margin));
  if (low <= high) {
    known.low = low;
    known.high = high;
  }
  std::vector<int32_t> inside;
  double above = 0.0;
  for (const int32_t key : sample) {
    if (key >= known.low && key <= known.high) inside.push_back(key);
    above += key > known.high;
  }
  if (static_cast<double>(inside.size()) * kCrowded <= size) return true;
  known.low = known.high = at(inside, position - above);
  return false;
}

KeyCut Ranking::cut(int64_t k, std::optional<float> guess) {
  Bracket known{kLowestKey, kInfinityKey, 0};
  if (total_ > kSmall) {
    const bool guessed = guess && std::isfinite(*guess);
    auto keys = sample(
        std::clamp(total_ / (guessed ? 1024 : 64), guessed ? kGuessedSample : kSmallSample, kLargeSample));
    for (int tries = 0; tries < kTries; ++tries) {
      Bracket next = known;
      const bool compact = choose_bracket(keys, k, next);
      if (guessed && compact) {
        const auto [low, high] = around(*guess);
        if (std::max(low, next.low) <= std::min(high, next.high)) {
          next.low = std::max(low, next.low);
          next.high = std::min(high, next.high);
        }
      }
      const Scan scanned = scan(next.low, next.high, compact);
      if (nan_source_ >= 0) return kKeepNone;
      const int64_t above = sum(scanned.above), inside = sum(scanned.inside);
      if (k <= above) {
        known.low = next.high + 1;
      } else if (k > above + inside) {
        known.high = next.low - 1;
        known.above = above + inside;
      } else {
        if (next.low == next.high) return cut_ties(next.low, k - above, scanned.inside);
        if (scanned.complete) return settle(scanned, k, next.low, next.high);
        known = {next.low, next.high, above};
      }
      if (compact) break;  // the sample or the guess was misleading
    }
  }
  int64_t inside = total_;
  while (inside > most_compacted() && known.low < known.high) {
    const auto bins = histogram(known.low, known.high, false);
    if (nan_source_ >= 0) return kKeepNone;
    int64_t wanted = k - known.above;
    inside = narrow(bins, wanted, known.low, known.high);
    known.above = k - wanted;
  }
  const Scan scanned = scan(known.low, known.high, known.low < known.high);
  if (nan_source_ >= 0) return kKeepNone;
  if (known.low == known.high) return cut_ties(known.low, k - known.above, scanned.inside);
  return settle(scanned, k, known.low, known.high);
}

// Entries of the chunk with flat index < tie_end whose key is the cut's.
int64_t Ranking::ties_before(const Chunk& chunk, KeyCut cut) const {
  int64_t ties = 0;
  int32_t keys[kBlock];
  const int64_t length = std::min(chunk.count, cut.tie_end - first(chunk));
  for (int64_t b = 0; b < length; b += kBlock) {
    const int64_t count = std::min(kBlock, length - b);
    selection_kernels().load_keys(sources_[chunk.source], chunk.begin + b, count, keys);
    ties += std::count(keys, keys + count, cut.key);
  }
  return ties;
}

std::vector<int64_t> Ranking::kept(KeyCut cut) {
  std::vector<int64_t> counts(sources_.size());
  const Scan scanned = scan(cut.key, cut.key, false);
  for (size_t c = 0; c < chunks_.size(); ++c) {
    const Chunk& chunk = chunks_[c];
    counts[chunk.source] += scanned.above[c];
    if (scanned.inside[c] > 0)
      counts[chunk.source] +=
          first(chunk) + chunk.count <= cut.tie_end ? scanned.inside[c] : ties_before(chunk, cut);
  }
  return counts;
}

void Ranking::check() { scan(INT32_MAX, INT32_MAX, false); }

}  // namespace sfpk
