// The ranking of the coordinates of some sources: where to cut it for k coordinates, or for a weight budget.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "selection.h"

namespace sfpk {

// Kept are the candidates with key > `key`, and of those with key == `key` the ones with flat index <
// `tie_end`.
struct KeyCut {
  int32_t key;
  int64_t tie_end;
};

constexpr int64_t kAllTies = INT64_MAX;
constexpr KeyCut kKeepNone{INT32_MAX, 0};
constexpr KeyCut kKeepAll{kNotCandidate, 0};

// Narrows [low, high] to the bin that holds the wanted-th entry from above, and `wanted` to its place in
// there. Returns how many are in the bin.
int64_t narrow(const std::vector<int64_t>& bins, int64_t& wanted, int32_t& low, int32_t& high);

class Ranking {
 public:
  explicit Ranking(std::vector<Source> sources);  // flat indices rising from source to source

  // The cut after the k best, 1 ≤ k < candidates; `guess` is the expected score there. Unspecified when a
  // score is NaN.
  KeyCut cut(int64_t k, std::optional<float> guess);

  // The cut after the longest prefix of the ranking whose sizes sum to at most `budget`.
  KeyCut budget_cut(int64_t budget);

  // How many candidates of each source a cut keeps.
  std::vector<int64_t> kept(KeyCut cut);

  // Looks for NaN, where nothing else needs the scores.
  void check();

  // The first source in which a NaN score was met by the calls so far, -1 for none.
  int64_t nan_source() const { return nan_source_; }

  const std::vector<Source>& sources() const { return sources_; }

 private:
  struct Chunk {
    int64_t source, begin, count;
    int64_t place;  // of its first entry, counted over all sources
  };
  struct Scan;
  struct Bracket {
    int32_t low, high;
    int64_t above;  // candidates with a key > high
  };

  int64_t first(const Chunk& c) const { return sources_[c.source].first + c.begin; }
  Scan scan(int32_t low, int32_t high, bool compact);
  std::vector<int32_t> sample(int64_t wanted) const;
  std::vector<int64_t> histogram(int32_t low, int32_t high, bool sizes);
  bool choose_bracket(std::vector<int32_t>& sample, int64_t k, Bracket& known) const;
  int64_t most_compacted() const;
  KeyCut settle(const Scan& scanned, int64_t k, int32_t low, int32_t high) const;
  KeyCut cut_ties(int32_t key, int64_t wanted, const std::vector<int64_t>& equals) const;
  int64_t ties_before(const Chunk& chunk, KeyCut cut) const;
  void note_nan(const std::vector<uint8_t>& nan_chunks);

  std::vector<Source> sources_;
  std::vector<Chunk> chunks_;
  int64_t total_ = 0;
  int64_t nan_source_ = -1;
};

}  // namespace sfpk
