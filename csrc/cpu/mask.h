// A mask as masked_weights_ takes it: bools, bits, factors, or particle values and their cut.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "codes.h"
#include "masked_weights.h"
#include "selection_masks.h"

namespace sfpk {

class Mask {
 public:
  using Tensor = torch::stable::Tensor;
  Mask(const Tensor& values, MaskKind kind, int64_t score, const std::optional<Tensor>& saliency,
       const std::optional<Tensor>& threshold, const std::optional<Tensor>& tie_end, const Tensor& segments);

  int64_t rows() const { return n_; }
  int64_t coordinates() const { return d_; }
  bool multiplies() const { return mask_kind_ == MaskKind::kFactors; }
  FloatKind kind() const { return kind_; }

  const char* factors(int64_t row, int64_t begin) const {
    return data_ + row * row_bytes_ + begin * bytes_of(kind_);
  }

  bool cuts() const { return mask_kind_ == MaskKind::kCut; }

  // f(block, entries) over the parts of coordinates [begin, begin + count) that one comparison decides.
  template <class F>
  void cut_blocks(int64_t row, int64_t begin, int64_t count, const F& f) const {
    const Source& source = rows_[row];
    CutBlock block{};
    block.kind = kind_;
    block.absolute = drops_sign(source.score);
    const auto& cuts = cuts_[row];
    auto segment =
        std::upper_bound(cuts.begin(), cuts.end(), begin,
                         [](int64_t index, const SegmentCut& candidate) { return index < candidate.end; });
    for (int64_t at = begin, end = begin + count; at < end;) {
      while (at >= segment->end) ++segment;
      const int64_t stop = std::min(end, segment->end);
      block.ties = at < segment->cut.tie_end;
      const int64_t next = block.ties ? std::min(stop, segment->cut.tie_end) : stop;
      block.threshold = float_from_key(segment->cut.key);
      block.values = data_ + row * row_bytes_ + at * bytes_of(kind_);
      block.saliency = source.saliency ? source.saliency + at : nullptr;
      f(block, at - begin, next - at);
      at = next;
    }
  }

  // Bools of coordinates [begin, begin + count), count ≤ kBlock; in place or through `buffer`.
  const uint8_t* keep(int64_t row, int64_t begin, int64_t count, uint8_t* buffer) const;

 private:
  int64_t n_, d_ = 0;
  MaskKind mask_kind_;
  FloatKind kind_ = FloatKind::kFloat;
  const char* data_ = nullptr;
  int64_t row_bytes_ = 0;
  std::vector<Source> rows_;
  std::vector<std::vector<SegmentCut>> cuts_;
};

}  // namespace sfpk
