// Scores on the device, rounded as in ops/selection/reference.py.
#pragma once

#include "codes.h"
#include "half.h"
#include "selection.h"
#include "selection_keys.h"

namespace sfpk::cuda {

__device__ inline float load_float(const void* values, FloatKind kind, int64_t at) {
  if (kind == FloatKind::kFloat) return static_cast<const float*>(values)[at];
  const uint16_t bits = static_cast<const uint16_t*>(values)[at];
  return kind == FloatKind::kBFloat16 ? float_from_bfloat16(bits) : float_from_half(bits);
}

__device__ inline float score_at(const Source& s, int64_t row, int64_t at) {
  const int64_t first = row * s.row_stride + at;
  float score = load_float(s.values, s.kind, first);
  if (drops_sign(s.score)) score = fabsf(score);
  if (!needs_saliency(s.score)) return score;
  if (s.score == Score::kMeanAbsSaliency) {
    for (int64_t i = 1; i < s.rows; ++i)
      score += fabsf(load_float(s.values, s.kind, first + i * s.row_stride));
    return score * s.saliency[at] * s.scale;
  }
  return score * s.saliency[at];
}

// The key of an entry; kNotCandidate where it is set aside. A NaN's key is no valid one.
__device__ inline int32_t key_at(const Source& s, int64_t row, int64_t at) {
  if (s.excluded && s.excluded[row * s.row_excluded + at]) return kNotCandidate;
  return key_from_float(score_at(s, row, at));
}

}  // namespace sfpk::cuda
