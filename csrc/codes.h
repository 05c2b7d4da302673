// The codes and numbers that host and device kernels share with Python, where they stand in
// sfpk_kernels/ops/codes.py. tests/test_codes.py compares the two, and that none is written down again.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sfpk {

// How floats are stored; arithmetic is in fp32.
enum class FloatKind { kFloat, kBFloat16, kHalf };

// What entries are ranked by.
enum class Score { kValue, kAbs, kAbsSaliency, kValueSaliency, kMeanAbsSaliency };

// What a mask is made of: bools, bits, factors, or particle values and their cut.
enum class MaskKind { kBool, kPacked, kFactors, kCut };

// How a selected mask is written, if at all.
enum class Packing { kNone = -1, kBool, kUint8, kInt32 };

constexpr int64_t kMostRows = 65535;  // along y of a CUDA grid

// Below this share of ‖g‖ the tangential part is rounding noise of fp32 products, not a direction.
constexpr double kTangentTolerance = 1e-6;

// Of the random bits of stochastic rounding: the multipliers of a bijection of 32-bit words (lowbias32), and
// how far a row and the high word of a column move them.
constexpr uint32_t kMixFirst = 0x7feb352d, kMixSecond = 0x846ca68b;
constexpr uint32_t kRowStride = 0x9e3779b9, kHighStride = 0x85ebca6b;

SFPK_HD constexpr int64_t bytes_of(FloatKind kind) { return kind == FloatKind::kFloat ? 4 : 2; }

SFPK_HD constexpr bool needs_saliency(Score score) {
  return score == Score::kAbsSaliency || score == Score::kValueSaliency || score == Score::kMeanAbsSaliency;
}

SFPK_HD constexpr bool drops_sign(Score score) {
  return score != Score::kValue && score != Score::kValueSaliency;
}

// Entries that a unit of a written mask holds, and its bytes.
constexpr int64_t unit_of(Packing packing) {
  return packing == Packing::kInt32 ? 32 : packing == Packing::kUint8 ? 8 : 1;
}
constexpr int64_t bytes_of(Packing packing) { return packing == Packing::kInt32 ? 4 : 1; }

}  // namespace sfpk
