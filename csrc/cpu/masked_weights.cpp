// masked_weights_: θ ⊙ mask on the CPU.
#include "masked_weights.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "checks.h"
#include "mask.h"
#include "masked_rows.h"

namespace {

using sfpk::bytes_of;
using sfpk::FloatKind;
using sfpk::kBlock;
using sfpk::Mask;
using sfpk::Piece;
using torch::stable::Tensor;

constexpr int64_t kStreamed = 32 << 20;  // bytes of output that would drive everything else from the caches

// Values of groups [0, groups) at the weights [begin, begin + count) they govern.
template <class T>
void spread(const T* groups, const Piece& piece, int64_t begin, int64_t count, T* out) {
  int64_t run = begin / piece.inner, used = begin % piece.inner;
  if (piece.inner == 1) {
    for (int64_t e = 0; e < count;) {
      const int64_t g = (begin + e) % piece.groups, length = std::min(piece.groups - g, count - e);
      std::copy_n(groups + g, length, out + e);
      e += length;
    }
    return;
  }
  for (int64_t e = 0; e < count; ++run, used = 0) {
    const int64_t length = std::min(piece.inner - used, count - e);
    std::fill_n(out + e, length, groups[run % piece.groups]);
    e += length;
  }
}

// The groups' bools and factors of a piece that shares coordinates among weights, all rows.
struct Groups {
  std::vector<uint8_t> keep;
  std::vector<char> factors;
};

// Each value `times` in succession.
template <class T>
void repeat(const T* values, int64_t count, int64_t times, T* out) {
  for (int64_t g = 0; g < count; ++g)
    for (int64_t i = 0; i < times; ++i) *out++ = values[g];
}

// Spreads the groups over `inner` once for all of `outer`: then they follow one another in memory.
void widen(const Mask& mask, Piece& piece, Groups& groups) {
  if (piece.outer == 1 || piece.inner == 1) return;
  const int64_t count = mask.rows() * piece.groups, inner = piece.inner, bytes = bytes_of(mask.kind());
  if (mask.multiplies()) {
    std::vector<char> wide(static_cast<size_t>(count * inner * bytes));
    if (mask.kind() == FloatKind::kFloat)
      repeat(reinterpret_cast<const uint32_t*>(groups.factors.data()), count, inner,
             reinterpret_cast<uint32_t*>(wide.data()));
    else
      repeat(reinterpret_cast<const uint16_t*>(groups.factors.data()), count, inner,
             reinterpret_cast<uint16_t*>(wide.data()));
    groups.factors = std::move(wide);
  } else {
    std::vector<uint8_t> wide(static_cast<size_t>(count * inner));
    repeat(groups.keep.data(), count, inner, wide.data());
    groups.keep = std::move(wide);
  }
  piece.groups *= inner;
  piece.inner = 1;
}

Groups groups_of(const Mask& mask, const Piece& piece) {
  Groups groups;
  const int64_t bytes = bytes_of(mask.kind());
  if (mask.multiplies())
    groups.factors.resize(static_cast<size_t>(mask.rows() * piece.groups * bytes));
  else
    groups.keep.resize(static_cast<size_t>(mask.rows() * piece.groups));
  for (int64_t row = 0; row < mask.rows(); ++row) {
    for (int64_t g = 0; g < piece.groups; g += kBlock) {
      const int64_t count = std::min(kBlock, piece.groups - g), at = row * piece.groups + g;
      if (mask.multiplies()) {
        std::copy_n(mask.factors(row, piece.first + g), count * bytes, groups.factors.data() + at * bytes);
        continue;
      }
      const uint8_t* keep = mask.keep(row, piece.first + g, count, groups.keep.data() + at);
      if (keep != groups.keep.data() + at) std::copy_n(keep, count, groups.keep.data() + at);
    }
  }
  return groups;
}

// Weights [begin, begin + count) of a piece under one row of the mask, count ≤ kBlock.
void apply(const Mask& mask, const Piece& piece, const Groups& groups, int64_t row, int64_t begin,
           int64_t count, char* out, FloatKind out_kind) {
  const auto& kernels = sfpk::masked_kernels();
  const char* from = static_cast<const char*>(piece.weights) + begin * bytes_of(piece.kind);
  const int64_t first = piece.first + begin;
  if (mask.multiplies()) {
    alignas(64) uint32_t wide[kBlock];
    const void* factors = wide;
    const char* own = groups.factors.data() + row * piece.groups * bytes_of(mask.kind());
    if (piece.single())
      factors = mask.factors(row, first);
    else if (mask.kind() == FloatKind::kFloat)
      spread(reinterpret_cast<const uint32_t*>(own), piece, begin, count, wide);
    else
      spread(reinterpret_cast<const uint16_t*>(own), piece, begin, count, reinterpret_cast<uint16_t*>(wide));
    kernels.scale(from, piece.kind, factors, mask.kind(), count, out, out_kind);
  } else if (piece.single() && mask.cuts()) {
    mask.cut_blocks(row, first, count, [&](const sfpk::CutBlock& block, int64_t at, int64_t entries) {
      kernels.select_cut(from + at * bytes_of(piece.kind), piece.kind, block, entries,
                         out + at * bytes_of(out_kind), out_kind);
    });
  } else {
    alignas(64) uint8_t bools[kBlock];
    const uint8_t* keep = bools;
    if (piece.single())
      keep = mask.keep(row, first, count, bools);
    else
      spread(groups.keep.data() + row * piece.groups, piece, begin, count, bools);
    kernels.select(from, piece.kind, keep, count, out, out_kind);
  }
}

void masked_weights_(const std::vector<Tensor>& weights, const Tensor& values, int64_t mask_kind,
                     int64_t score, const std::optional<Tensor>& saliency,
                     const std::optional<Tensor>& threshold, const std::optional<Tensor>& tie_end,
                     const Tensor& segments, std::vector<int64_t> layout, std::vector<Tensor> out) {
  const char* op = "masked_weights_";
  const Mask mask(values, sfpk::mask_kind_of(mask_kind, op), score, saliency, threshold, tie_end, segments);
  auto pieces = sfpk::pieces_of(weights, layout, mask.coordinates(), op);
  SFPK_CHECK(out.size() == pieces.size(), op, "out", pieces.size(), out.size(), " tensors");
  std::vector<sfpk::Rows<char*>> to;
  std::vector<Groups> groups;
  for (size_t p = 0; p < pieces.size(); ++p) {
    to.push_back(sfpk::rows_of<char*>(out[p], mask.rows(), pieces[p].count(), op, "out"));
    groups.push_back(pieces[p].single() ? Groups{} : groups_of(mask, pieces[p]));
    if (!pieces[p].single()) widen(mask, pieces[p], groups[p]);
  }
  int64_t bytes = 0;
  for (size_t p = 0; p < pieces.size(); ++p) bytes += mask.rows() * pieces[p].count() * bytes_of(to[p].kind);
  const bool streams = bytes >= kStreamed;
  const auto& kernels = sfpk::masked_kernels();
  sfpk::for_tiles(pieces, [&](size_t p, int64_t first, int64_t length) {
    alignas(64) char passing[4 * kBlock];  // on its way past the caches
    for (int64_t row = 0; row < mask.rows(); ++row) {
      for (int64_t begin = first; begin < first + length; begin += kBlock) {
        const int64_t count = std::min(kBlock, first + length - begin);
        char* target = to[p].at(row, begin);
        apply(mask, pieces[p], groups[p], row, begin, count, streams ? passing : target, to[p].kind);
        if (streams) kernels.stream(passing, count * bytes_of(to[p].kind), target);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CPU, m) { m.impl("masked_weights_", TORCH_BOX(&masked_weights_)); }
