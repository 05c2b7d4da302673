#include "selection_segments.h"

#include <algorithm>

namespace sfpk {

std::vector<Source> slice(const std::vector<Source>& sources, int64_t begin, int64_t end) {
  std::vector<Source> parts;
  for (const Source& source : sources) {
    const int64_t from = std::max(begin - source.first, int64_t{0});
    const int64_t to = std::min(end - source.first, source.count);
    if (from >= to) continue;
    Source part = source;
    part.values = static_cast<const char*>(source.values) + from * bytes_of(source.kind);
    part.first += from;
    part.count = to - from;
    if (part.saliency) part.saliency += from;
    if (part.excluded) part.excluded += from;
    if (part.always) part.always += from;
    if (part.sizes) part.sizes += from;
    parts.push_back(part);
  }
  return parts;
}

namespace {

// The cut of one ranking, k = none and k = all included.
KeyCut cut_ranking(Ranking& ranking, int64_t k, int64_t free, std::optional<float> guess, int64_t& nan_at) {
  KeyCut cut = k == 0 ? kKeepNone : kKeepAll;
  if (k == 0 || k == free)
    ranking.check();
  else
    cut = ranking.cut(k, guess);
  if (ranking.nan_source() >= 0) nan_at = ranking.sources()[ranking.nan_source()].first;
  return cut;
}

// How many each segment keeps: clamp(above one common cut, floor, cap). Where the clamped counts of the
// common cut sum to too many, the cut can only rise, so segments at their floors stay there; they are settled
// and the others share the rest. Likewise for too few and the caps. Every round settles a segment.
std::vector<int64_t> share_out(const std::vector<Source>& sources, const std::vector<Segment>& segments,
                               int64_t k, int64_t& nan_at) {
  std::vector<int64_t> shares(segments.size());
  std::vector<size_t> open(segments.size());
  for (size_t s = 0; s < open.size(); ++s) open[s] = s;
  while (!open.empty()) {
    std::vector<Source> parts;
    std::vector<size_t> owner;  // of each part: place in `open`
    int64_t free = 0;
    for (size_t o = 0; o < open.size(); ++o) {
      const Segment& segment = segments[open[o]];
      free += segment.free;
      for (const Source& part : slice(sources, segment.begin, segment.end)) {
        parts.push_back(part);
        owner.push_back(o);
      }
    }
    Ranking ranking(std::move(parts));
    const KeyCut cut = cut_ranking(ranking, k, free, std::nullopt, nan_at);
    if (nan_at >= 0) return shares;
    const auto kept = ranking.kept(cut);
    std::vector<int64_t> counts(open.size());
    for (size_t part = 0; part < kept.size(); ++part) counts[owner[part]] += kept[part];
    int64_t excess = -k;
    for (size_t o = 0; o < open.size(); ++o)
      excess += std::clamp(counts[o], segments[open[o]].floor, segments[open[o]].cap);
    std::vector<size_t> still_open;
    for (size_t o = 0; o < open.size(); ++o) {
      const Segment& segment = segments[open[o]];
      const int64_t share = std::clamp(counts[o], segment.floor, segment.cap);
      const bool settled = excess == 0 || (excess > 0 && counts[o] <= segment.floor) ||
                           (excess < 0 && counts[o] >= segment.cap);
      if (settled) {
        shares[open[o]] = share;
        k -= share;
      } else {
        still_open.push_back(open[o]);
      }
    }
    open = std::move(still_open);
  }
  return shares;
}

}  // namespace

std::vector<KeyCut> cut_segments(const std::vector<Source>& sources, const std::vector<Segment>& segments,
                                 int64_t k, int64_t& nan_at) {
  nan_at = -1;
  if (segments.size() == 1) {
    Ranking ranking(sources);
    return {cut_ranking(ranking, k, segments[0].free, segments[0].guess, nan_at)};
  }
  std::vector<KeyCut> cuts(segments.size(), kKeepNone);
  const auto shares = share_out(sources, segments, k, nan_at);
  for (size_t s = 0; s < segments.size() && nan_at < 0; ++s) {
    const Segment& segment = segments[s];
    if (shares[s] == segment.free && shares[s] > 0) cuts[s] = kKeepAll;
    if (shares[s] == 0 || shares[s] == segment.free) continue;
    cuts[s] = Ranking(slice(sources, segment.begin, segment.end)).cut(shares[s], segment.guess);
  }
  return cuts;
}

}  // namespace sfpk
