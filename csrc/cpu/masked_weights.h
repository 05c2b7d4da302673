// The block kernels of masked weights, of one instruction set.
#pragma once

#include <cstdint>

#include "codes.h"
#include "selection.h"

namespace sfpk {

// Particle values and where they are cut: kept are scores > threshold, with `ties` also those equal to it.
struct CutBlock {
  const void* values;
  FloatKind kind;
  const float* saliency;  // or null
  bool absolute;
  float threshold;
  bool ties;
};

// Each takes up to kBlock entries; values of any kind, arithmetic in fp32, results rounded to nearest.
struct MaskedKernels {
  // out = keep ? weights : 0.
  void (*select)(const void* weights, FloatKind kind, const uint8_t* keep, int64_t count, void* out,
                 FloatKind out_kind);
  // The same for the entries a cut keeps; a NaN score is not kept.
  void (*select_cut)(const void* weights, FloatKind kind, const CutBlock& block, int64_t count, void* out,
                     FloatKind out_kind);
  // out = weights · factors.
  void (*scale)(const void* weights, FloatKind kind, const void* factors, FloatKind factors_kind,
                int64_t count, void* out, FloatKind out_kind);
  // A copy past the caches.
  void (*stream)(const void* from, int64_t bytes, void* to);
  void (*fence)();
};

namespace baseline {
extern const MaskedKernels kMasked;
}
namespace avx2 {
extern const MaskedKernels kMasked;
}
namespace avx512 {
extern const MaskedKernels kMasked;
}

const MaskedKernels& masked_kernels();

}  // namespace sfpk
