// What the selection's files share: the sources to be ranked, and the block kernels of one instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "codes.h"
#include "half.h"
#include "selection_keys.h"

namespace sfpk {

// Coordinates that lie one after the other in memory: a row, a tensor of a list, or a part of either.
struct Source {
  const void* values;  // (rows, count), rows > 1 only for kMeanAbsSaliency
  FloatKind kind;
  Score score;
  int64_t rows, row_stride, count;
  int64_t first;            // flat index of entry 0
  float scale;              // 1 / rows
  const float* saliency;    // (count), or null
  const uint8_t* excluded;  // (count) bool: no candidates of the ranking; or null
  const uint8_t* always;    // (count) bool: kept whatever the ranking says; or null
  const int64_t* sizes;     // (count) weights governed by each coordinate, or null
};

constexpr int64_t kBlock = 1024;    // entries a block kernel takes: keys and floats stay in L1
constexpr int64_t kScanSlack = 16;  // entries scan() may write past the ones it returns

struct ScanCounts {
  int64_t above, inside;
};

struct SelectionKernels {
  // Keys of entries [begin, begin + count), count ≤ kBlock; returns whether a score was NaN.
  bool (*load_keys)(const Source&, int64_t begin, int64_t count, int32_t* keys);
  // How many keys are > high and how many in [low, high]; the latter, in order, to `out` unless it is null.
  ScanCounts (*scan)(const int32_t* keys, int64_t count, int32_t low, int32_t high, int32_t* out);
  // out = key > threshold.
  void (*compare)(const int32_t* keys, int64_t count, int32_t threshold, uint8_t* out);
};

namespace baseline {
extern const SelectionKernels kSelection;
}
namespace avx2 {
extern const SelectionKernels kSelection;
}
namespace avx512 {
extern const SelectionKernels kSelection;
}

const SelectionKernels& selection_kernels();

}  // namespace sfpk
