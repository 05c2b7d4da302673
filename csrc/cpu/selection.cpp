// topk_: exact selection on the CPU, per row or over a list of tensors, as cuts and as masks; and
// pattern_excluded_, which says what an N:M pattern leaves out before that.
#include "selection.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "integers.h"
#include "isa.h"
#include "received.h"
#include "selection_masks.h"
#include "selection_pattern.h"
#include "selection_segments.h"

namespace sfpk {

const SelectionKernels& selection_kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kAvx512:
      return avx512::kSelection;
    case Isa::kAvx2:
      return avx2::kSelection;
    default:
      break;
  }
#endif
  return baseline::kSelection;
}

}  // namespace sfpk

namespace {

using sfpk::ceil_div;
using sfpk::KeyCut;
using sfpk::kind_of;
using sfpk::Packing;
using sfpk::Score;
using sfpk::Segment;
using sfpk::Source;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSerialRow = 1 << 20;  // rows up to this many entries are shared out whole among threads
constexpr int64_t kGrain = 1 << 16;      // entries that are worth a thread

// One tensor per entry of `values`, contiguous and alike in size, or none at all.
template <class T>
const T* data_of(const std::vector<Tensor>& tensors, size_t i, int64_t count, ScalarType type, const char* op,
                 const char* name) {
  if (tensors.empty()) return nullptr;
  SFPK_CHECK(i < tensors.size() && tensors[i].is_contiguous() && tensors[i].scalar_type() == type &&
                 tensors[i].numel() == count,
             op, name, "one contiguous tensor per tensor of values", "others");
  return static_cast<const T*>(tensors[i].const_data_ptr());
}

struct Inputs {
  const std::vector<Tensor>&values, &saliency, &excluded, &always, &sizes;
  bool rows;
  Score score;
};

// What a call ranks: one list of sources per row, or one over all tensors of a list.
std::vector<std::vector<Source>> sources_of(const Inputs& in, const char* op) {
  std::vector<std::vector<Source>> all;
  if (in.rows) {
    SFPK_CHECK(in.values.size() == 1 && in.values[0].dim() == 2, op, "values", "shape (n, d)", "another");
    const Tensor& values = in.values[0];
    const int64_t n = values.size(0), d = values.size(1);
    SFPK_CHECK(d <= 1 || values.stride(1) == 1, op, "values", "rows without gaps", "others");
    const bool mean = in.score == Score::kMeanAbsSaliency;
    const int64_t outputs = mean ? 1 : n;
    Source source{};
    source.kind = kind_of(values, op, "values");
    source.score = in.score;
    source.rows = mean ? n : 1;
    source.row_stride = values.stride(0);
    source.scale = 1.0f / static_cast<float>(n);
    source.count = d;
    source.saliency = data_of<float>(in.saliency, 0, d, ScalarType::Float, op, "saliency");
    source.sizes = data_of<int64_t>(in.sizes, 0, d, ScalarType::Long, op, "sizes");
    const auto* excluded = data_of<uint8_t>(in.excluded, 0, outputs * d, ScalarType::Bool, op, "excluded");
    const auto* always = data_of<uint8_t>(in.always, 0, outputs * d, ScalarType::Bool, op, "always");
    const int64_t bytes = sfpk::bytes_of(source.kind);
    for (int64_t row = 0; row < outputs; ++row) {
      source.values = static_cast<const char*>(values.const_data_ptr()) + row * values.stride(0) * bytes;
      source.excluded = excluded ? excluded + row * d : nullptr;
      source.always = always ? always + row * d : nullptr;
      all.push_back({source});
    }
    return all;
  }
  int64_t first = 0;
  all.emplace_back();
  for (size_t i = 0; i < in.values.size(); ++i) {
    SFPK_CHECK(in.values[i].is_contiguous(), op, "values", "contiguous tensors", "a strided one");
    Source source{};
    source.values = in.values[i].const_data_ptr();
    source.kind = kind_of(in.values[i], op, "values");
    source.score = in.score;
    source.rows = 1;
    source.count = in.values[i].numel();
    source.first = first;
    source.saliency = data_of<float>(in.saliency, i, source.count, ScalarType::Float, op, "saliency");
    source.sizes = data_of<int64_t>(in.sizes, i, source.count, ScalarType::Long, op, "sizes");
    source.excluded = data_of<uint8_t>(in.excluded, i, source.count, ScalarType::Bool, op, "excluded");
    source.always = data_of<uint8_t>(in.always, i, source.count, ScalarType::Bool, op, "always");
    first += source.count;
    all[0].push_back(source);
  }
  return all;
}

Inputs checked(const std::vector<Tensor>& values, const std::vector<Tensor>& saliency,
               const std::vector<Tensor>& excluded, const std::vector<Tensor>& always,
               const std::vector<Tensor>& sizes, bool rows, int64_t score, const char* op) {
  const Score kind = sfpk::score_of(score, op);
  SFPK_CHECK(saliency.size() == (sfpk::needs_saliency(kind) ? values.size() : 0), op, "saliency",
             "one where the score needs it", saliency.size());
  SFPK_CHECK(rows || kind != Score::kMeanAbsSaliency, op, "score", "a score of single entries in a list",
             score);
  return {values, saliency, excluded, always, sizes, rows, kind};
}

// Which row, or which tensor of the list, an error is about.
int64_t culprit(const Inputs& in, const std::vector<Source>& sources, int64_t row, int64_t flat) {
  if (in.rows) return row;
  for (size_t i = 0; i < sources.size(); ++i)
    if (flat < sources[i].first + sources[i].count) return static_cast<int64_t>(i);
  return 0;
}

const int64_t* table(const Tensor& t, int64_t count, const char* name) {
  SFPK_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.numel() == count, "topk_", name,
             count, t.numel(), " entries");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// Returns -1, or the row (the tensor of a list) with a NaN score; nothing else is to be used then.
int64_t topk_(const std::vector<Tensor>& values, bool rows, int64_t score,
              const std::vector<Tensor>& saliency, const std::vector<Tensor>& excluded,
              const std::vector<Tensor>& always, const std::vector<Tensor>& sizes,
              const Tensor& counts,                        // (rows)
              const Tensor& segments,                      // (S + 1)
              const Tensor& limits,                        // (3, rows, S): floor, cap, candidates
              const std::optional<Tensor>& guess,          // (rows, S) fp32
              int64_t packing, std::vector<Tensor> masks,  // one per tensor of values
              Tensor threshold, Tensor tie_end) {          // (rows, S)
  const Inputs in = checked(values, saliency, excluded, always, sizes, rows, score, "topk_");
  const auto all = sources_of(in, "topk_");
  const int64_t n = static_cast<int64_t>(all.size()), parts = segments.numel() - 1;
  const int64_t d = rows ? values[0].size(1) : all[0].empty() ? 0 : all[0].back().first + all[0].back().count;
  const int64_t* k = table(counts, n, "counts");
  const int64_t* border = table(segments, parts + 1, "segments");
  const int64_t* limit = table(limits, 3 * n * parts, "limits");
  SFPK_CHECK(border[0] == 0 && border[parts] == d, "topk_", "segments", "borders from 0 to d", "others");
  SFPK_CHECK(threshold.scalar_type() == ScalarType::Float && threshold.is_contiguous() &&
                 threshold.numel() == n * parts && tie_end.scalar_type() == ScalarType::Long &&
                 tie_end.is_contiguous() && tie_end.numel() == n * parts,
             "topk_", "threshold, tie_end", "contiguous (rows, segments)", "others");
  SFPK_CHECK(!guess || (guess->scalar_type() == ScalarType::Float && guess->is_contiguous() &&
                        guess->numel() == n * parts),
             "topk_", "guess", "contiguous fp32 (rows, segments)", "another");
  const Packing form = sfpk::packing_of(packing, "topk_");
  const int64_t unit = sfpk::unit_of(form), unit_bytes = sfpk::bytes_of(form);
  SFPK_CHECK(form == Packing::kNone || masks.size() == values.size(), "topk_", "masks",
             "one per tensor of values", masks.size());
  const auto* guesses = guess ? static_cast<const float*>(guess->const_data_ptr()) : nullptr;
  auto* thresholds = static_cast<float*>(threshold.mutable_data_ptr());
  auto* ends = static_cast<int64_t*>(tie_end.mutable_data_ptr());
  std::vector<void*> out(masks.size());
  std::vector<int64_t> line(masks.size());
  for (size_t i = 0; i < masks.size() && form != Packing::kNone; ++i) {
    SFPK_CHECK(masks[i].is_contiguous(), "topk_", "masks", "contiguous tensors", "a strided one");
    out[i] = masks[i].mutable_data_ptr();
    line[i] = rows ? d : values[i].dim() ? values[i].size(values[i].dim() - 1) : 1;
    const int64_t lines = rows ? n : line[i] ? values[i].numel() / line[i] : 0;
    SFPK_CHECK(masks[i].numel() == lines * ceil_div(line[i], unit) &&
                   static_cast<int64_t>(masks[i].element_size()) == unit_bytes,
               "topk_", "masks", "the shape and dtype of the packing", "another");
  }

  std::vector<int64_t> wrong(n, -1);
  const auto solve = [&](int64_t row) {
    std::vector<KeyCut> cuts;
    int64_t nan_at = -1;
    if (!sizes.empty()) {
      sfpk::Ranking ranking(all[row]);
      const int64_t candidates = limit[2 * n * parts + row * parts];
      cuts = {ranking.budget_cut(k[row])};
      if (candidates == 0) cuts = {sfpk::kKeepNone};
      if (ranking.nan_source() >= 0) nan_at = ranking.sources()[ranking.nan_source()].first;
    } else {
      std::vector<Segment> parts_of_row;
      for (int64_t s = 0; s < parts; ++s) {
        const int64_t at = row * parts + s;
        std::optional<float> guessed;
        if (guesses) guessed = guesses[at];
        parts_of_row.push_back(
            {border[s], border[s + 1], limit[at], limit[n * parts + at], limit[2 * n * parts + at], guessed});
      }
      cuts = sfpk::cut_segments(all[row], parts_of_row, k[row], nan_at);
    }
    if (nan_at >= 0) {
      wrong[row] = culprit(in, all[row], row, nan_at);
      return;
    }
    std::vector<sfpk::SegmentCut> ordered;
    for (int64_t s = 0; s < parts; ++s) {
      const auto& cut = cuts[s];
      const bool none = cut.key == sfpk::kKeepNone.key, everything = cut.key == sfpk::kKeepAll.key;
      const float infinity = std::numeric_limits<float>::infinity();
      thresholds[row * parts + s] = none ? infinity : everything ? -infinity : sfpk::float_from_key(cut.key);
      ends[row * parts + s] = none ? 0 : everything ? d : std::min(d, cut.tie_end);
      ordered.push_back({border[s + 1], cut});
    }
    if (form == Packing::kNone) return;
    std::vector<sfpk::MaskOutput> outputs;
    const int64_t row_bytes = ceil_div(d, unit) * unit_bytes;
    for (size_t i = 0; i < out.size(); ++i)
      outputs.push_back({static_cast<char*>(out[i]) + (rows ? row * row_bytes : 0), line[i]});
    sfpk::write_masks(all[row], ordered, outputs, form);
  };
  if (n > 1 && d <= kSerialRow) {
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, kGrain / (d + 1)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t row = begin; row < end; ++row) solve(row);
                                });
  } else {
    for (int64_t row = 0; row < n; ++row) solve(row);
  }
  for (const int64_t row : wrong)
    if (row >= 0) return row;
  return -1;
}

// out = excluded, and whatever is not among the best `keep` of its `group` consecutive entries, those kept
// always counted first. Returns -1, or the row (the tensor of a list) with a NaN score.
int64_t pattern_excluded_(const std::vector<Tensor>& values, bool rows, int64_t score,
                          const std::vector<Tensor>& saliency, const std::vector<Tensor>& excluded,
                          const std::vector<Tensor>& always, int64_t keep, int64_t group,
                          std::vector<Tensor> out) {
  const std::vector<Tensor> no_sizes;
  const Inputs in = checked(values, saliency, excluded, always, no_sizes, rows, score, "pattern_excluded_");
  const auto all = sources_of(in, "pattern_excluded_");
  SFPK_CHECK(out.size() == values.size(), "pattern_excluded_", "out", "one per tensor of values", out.size());
  for (size_t row = 0; row < all.size(); ++row) {
    for (size_t i = 0; i < all[row].size(); ++i) {
      const Source& source = all[row][i];
      SFPK_CHECK(group > 0 && source.count % group == 0 && out[i].is_contiguous() &&
                     out[i].scalar_type() == ScalarType::Bool &&
                     out[i].numel() == source.count * (rows ? static_cast<int64_t>(all.size()) : 1),
                 "pattern_excluded_", "out", "contiguous bools of whole groups", "others");
      auto* to = static_cast<uint8_t*>(out[i].mutable_data_ptr()) + (rows ? row * source.count : 0);
      if (sfpk::exclude_by_pattern(source, keep, group, to)) return static_cast<int64_t>(rows ? row : i);
    }
  }
  return -1;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CPU, m) {
  m.impl("topk_", TORCH_BOX(&topk_));
  m.impl("pattern_excluded_", TORCH_BOX(&pattern_excluded_));
}
