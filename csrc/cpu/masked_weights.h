// The block kernels of masked weights, of one instruction set.
#pragma once

#include <cstdint>

#include "selection.h"

namespace sfpk {

// Each takes up to kBlock entries; values of any kind, arithmetic in fp32, results rounded to nearest.
struct MaskedKernels {
  // out = keep ? weights : 0.
  void (*select)(const void* weights, ValueKind kind, const uint8_t* keep, int64_t count, void* out,
                 ValueKind out_kind);
  // out = weights · factors.
  void (*scale)(const void* weights, ValueKind kind, const void* factors, ValueKind factors_kind,
                int64_t count, void* out, ValueKind out_kind);
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
