#include "mask.h"

#include "bits.h"
#include "checks.h"
#include "integers.h"
#include "received.h"

namespace sfpk {

using torch::headeronly::ScalarType;

Mask::Mask(const Tensor& values, MaskKind kind, int64_t score, const std::optional<Tensor>& saliency,
           const std::optional<Tensor>& threshold, const std::optional<Tensor>& tie_end,
           const Tensor& segments)
    : n_(values.size(0)), mask_kind_(kind) {
  const char* op = "masked_weights_";
  SFPK_CHECK(values.dim() == 2 && (values.size(1) <= 1 || values.stride(1) == 1), op, "mask",
             "rows without gaps", "another tensor");
  data_ = static_cast<const char*>(values.const_data_ptr());
  row_bytes_ = values.stride(0) * static_cast<int64_t>(values.element_size());
  const auto type = values.scalar_type();
  SFPK_CHECK(segments.scalar_type() == ScalarType::Long && segments.is_contiguous() && segments.numel() >= 2,
             op, "segments", "int64 borders", "others");
  const auto* border = static_cast<const int64_t*>(segments.const_data_ptr());
  const int64_t parts = segments.numel() - 1;
  d_ = border[parts];
  if (kind == MaskKind::kBool) {
    SFPK_CHECK(type == ScalarType::Bool && values.size(1) == d_, op, "mask", "bools", "another mask");
  } else if (kind == MaskKind::kPacked) {
    const int64_t unit = 8 * static_cast<int64_t>(values.element_size());
    SFPK_CHECK((type == ScalarType::Byte || type == ScalarType::Int) && values.size(1) == ceil_div(d_, unit),
               op, "mask", "packed bits", "another mask");
  } else {
    kind_ = kind_of(values, op, "mask");
    SFPK_CHECK(values.size(1) == d_, op, "mask", d_, values.size(1), " columns");
  }
  if (kind != MaskKind::kCut) return;
  SFPK_CHECK(threshold && tie_end && threshold->is_contiguous() && tie_end->is_contiguous() &&
                 threshold->scalar_type() == ScalarType::Float &&
                 tie_end->scalar_type() == ScalarType::Long && threshold->numel() == n_ * parts &&
                 tie_end->numel() == n_ * parts,
             op, "cut", "fp32 thresholds and int64 tie ends per row and segment", "others");
  const Score ranks = score_of(score, op, Score::kValueSaliency);
  const bool sized = needs_saliency(ranks);
  SFPK_CHECK(!sized || (saliency && saliency->is_contiguous() && saliency->numel() == d_ &&
                        saliency->scalar_type() == ScalarType::Float),
             op, "saliency", "contiguous fp32, one per coordinate", "another");
  const auto* thresholds = static_cast<const float*>(threshold->const_data_ptr());
  const auto* ends = static_cast<const int64_t*>(tie_end->const_data_ptr());
  for (int64_t row = 0; row < n_; ++row) {
    Source source{};
    source.values = data_ + row * row_bytes_;
    source.kind = kind_;
    source.score = ranks;
    source.rows = 1;
    source.count = d_;
    if (sized) source.saliency = static_cast<const float*>(saliency->const_data_ptr());
    rows_.push_back(source);
    cuts_.emplace_back();
    for (int64_t s = 0; s < parts; ++s)
      cuts_.back().push_back(
          {border[s + 1], {key_from_float(thresholds[row * parts + s]), ends[row * parts + s]}});
  }
}

const uint8_t* Mask::keep(int64_t row, int64_t begin, int64_t count, uint8_t* buffer) const {
  const auto* bytes = reinterpret_cast<const uint8_t*>(data_ + row * row_bytes_);
  if (mask_kind_ == MaskKind::kBool) return bytes + begin;
  if (mask_kind_ == MaskKind::kPacked)
    unpack_bits(bytes, begin, count, buffer);
  else
    keep_of(rows_[row], cuts_[row], begin, count, buffer);
  return buffer;
}

}  // namespace sfpk
