// Codes and kinds as an op receives them from Python, checked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

#include "checks.h"
#include "codes.h"

namespace sfpk {

inline FloatKind kind_of(const torch::stable::Tensor& t, const char* op, const char* name) {
  using torch::headeronly::ScalarType;
  const auto type = t.scalar_type();
  SFPK_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, name,
             "fp32, bf16 or fp16", "another dtype");
  return type == ScalarType::Float      ? FloatKind::kFloat
         : type == ScalarType::BFloat16 ? FloatKind::kBFloat16
                                        : FloatKind::kHalf;
}

// A code of an enum whose values run from `first` to `last` without gaps.
template <class Code>
Code code_of(int64_t value, Code first, Code last, const char* op, const char* name) {
  const auto low = static_cast<int64_t>(first), high = static_cast<int64_t>(last);
  SFPK_CHECK(value >= low && value <= high, op, name, std::to_string(low) + " to " + std::to_string(high),
             value);
  return static_cast<Code>(value);
}

inline Score score_of(int64_t code, const char* op, Score last = Score::kMeanAbsSaliency) {
  return code_of(code, Score::kValue, last, op, "score");
}

inline MaskKind mask_kind_of(int64_t code, const char* op) {
  return code_of(code, MaskKind::kBool, MaskKind::kCut, op, "mask kind");
}

inline Packing packing_of(int64_t code, const char* op) {
  return code_of(code, Packing::kNone, Packing::kInt32, op, "packing");
}

}  // namespace sfpk
