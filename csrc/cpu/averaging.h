// Averages of gradients: the kernel of one instruction set.
#pragma once

#include <cstdint>

#include "codes.h"
#include "half.h"

namespace sfpk {

constexpr int64_t kAveragingBlock = 1024;  // entries of two bytes that are widened at once: they stay in L1
constexpr int64_t kGradientSums = 4;

// Columns of one row of gradients; nothing is averaged where `averages` is null.
struct GradientPiece {
  void* grads;  // written where beta > 0
  const void* averages;
  const void* weights;
  bool exact;  // all three are fp64; otherwise of the kinds below
  FloatKind kind, weights_kind;
  int64_t count;
  double beta;
};

// Adds Σab, Σa², Σb² and Σa⁴ of a = weights ⊙ grads (as they were) and b = weights ⊙ averages to sums, in
// fp64.
using AveragePiece = void (*)(const GradientPiece& piece, double* sums);

namespace baseline {
void average_piece(const GradientPiece& piece, double* sums);
}
namespace avx2 {
void average_piece(const GradientPiece& piece, double* sums);
}
namespace avx512 {
void average_piece(const GradientPiece& piece, double* sums);
}

}  // namespace sfpk
