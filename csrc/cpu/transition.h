// What the fused transition's files share: the problem, the passes, and one entry per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "codes.h"
#include "half.h"
#include "integers.h"

namespace sfpk {

constexpr int kReduceSums = 8;  // per particle: e.e, e.s, e.u, u.u, u.s, c u.u, c s.u, c s.s with s = c*m
constexpr int kUpdateSums = 4;  // per particle: m.m, c m.m, c c m.m, a m.m
constexpr int kGrams = 6;       // n x n each: m.m, m.u, u.u, and with sizes (c m).m, (c m).u, (c m).(c m)

// Rows of a tile start at different cache sets.
constexpr int64_t kRowPadding = 32;

enum class Pass { kReduce, kUpdate };

// All of one call that a tile needs. Vectors over coordinates are (d), over particles (n).
struct Problem {
  int64_t n, d, tile;
  void* masks;  // (n, d)
  int64_t mask_stride;
  FloatKind mask_kind;
  uint16_t* residual;  // (n, d) of bf16 particles: what rounding took from them
  int64_t residual_stride;
  uint64_t key;          // of the stochastic rounding of fp16 particles
  int64_t first_column;  // of the coordinates that this call holds, among all
  const void* grads;     // (n, d)
  int64_t grad_stride;
  FloatKind grad_kind;
  const float *weights, *saliency, *sizes;  // (d), or null
  bool repel, grams, moves;
  int64_t only;        // the one particle that moves, its gradient the one row of grads; -1 for all
  const float* mix;    // (n, n): repulsion as a mix of centred particles
  const float* guess;  // (n): u is accumulated as g - guess * s
  const float *slope_high, *slope_low;                   // (n): u = g - slope * s, slope in two floats
  const float *keep, *radial, *tangential, *after_pull;  // (n): m += keep m + radial s + tangential u
  float pull;                                            // consensus
  const char* skipped;                                   // (n): particles that stay where they are
};

// Adds the sums of columns [begin, end) to `sums`; the update pass also moves them.
using RunChunk = void (*)(const Problem&, Pass, int64_t begin, int64_t end, float* scratch, double* sums);

namespace baseline {
void run_chunk(const Problem&, Pass, int64_t, int64_t, float*, double*);
}
namespace avx2 {
void run_chunk(const Problem&, Pass, int64_t, int64_t, float*, double*);
}
namespace avx512 {
void run_chunk(const Problem&, Pass, int64_t, int64_t, float*, double*);
}

}  // namespace sfpk
