#include "masked_rows.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "integers.h"
#include "isa.h"
#include "masked_weights.h"

namespace sfpk {

const MaskedKernels& masked_kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kAvx512:
      return avx512::kMasked;
    case Isa::kAvx2:
      return avx2::kMasked;
    default:
      break;
  }
#endif
  return baseline::kMasked;
}

namespace {

constexpr int64_t kTile = 4 * kBlock;  // weights whose rows are done one after the other
constexpr int64_t kGrain = 8;          // tiles

}  // namespace

void for_tiles(const std::vector<Piece>& pieces, const std::function<void(size_t, int64_t, int64_t)>& f) {
  std::vector<int64_t> starts;  // first tile of each piece
  int64_t tiles = 0;
  for (const Piece& piece : pieces) {
    starts.push_back(tiles);
    tiles += ceil_div(piece.count(), kTile);
  }
  torch::stable::parallel_for(0, tiles, kGrain, [&](int64_t begin, int64_t end) {
    auto at = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin()) - 1;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (at + 1 < starts.size() && tile >= starts[at + 1]) ++at;
      const int64_t first = (tile - starts[at]) * kTile;
      f(at, first, std::min(kTile, pieces[at].count() - first));
    }
    masked_kernels().fence();
  });
}

}  // namespace sfpk
