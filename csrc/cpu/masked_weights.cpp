// masked_weights_: θ ⊙ mask on the CPU, from bools, bits, factors, or particle values and their cut; and
// mask_gradient_, its derivative.
#include "masked_weights.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <vector>

#include "bits.h"
#include "checks.h"
#include "integers.h"
#include "isa.h"
#include "received.h"
#include "selection_masks.h"

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

}  // namespace sfpk

namespace {

using sfpk::bytes_of;
using sfpk::ceil_div;
using sfpk::FloatKind;
using sfpk::kBlock;
using sfpk::kind_of;
using sfpk::MaskKind;
using sfpk::Piece;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 4 * kBlock;    // weights whose rows are done one after the other
constexpr int64_t kGrain = 8;            // tiles
constexpr int64_t kStreamed = 32 << 20;  // bytes of output that would drive everything else from the caches

// Rows of (…, count) values beside each other; `data` is a char* or const char*.
template <class Data>
struct Rows {
  Data data;
  FloatKind kind;
  int64_t row_bytes;
  Data at(int64_t row, int64_t entry) const { return data + row * row_bytes + entry * bytes_of(kind); }
};

void check_rows(const Tensor& t, int64_t n, int64_t count, const char* op, const char* name) {
  SFPK_CHECK(t.dim() == 2 && t.size(0) == n && t.size(1) == count && (count <= 1 || t.stride(1) == 1), op,
             name, "(rows, weights of the piece) without gaps", "another tensor");
}

// Weights seen as (outer, groups, inner), governed by the coordinates [first, first + groups).
struct Weights {
  const char* weights;
  FloatKind kind;
  int64_t outer, groups, inner, first;
  int64_t count() const { return outer * groups * inner; }
  bool single() const { return outer * inner == 1; }
};

std::vector<Weights> pieces_of(const std::vector<Tensor>& weights, const Tensor& layout, const char* op) {
  const auto pieces = static_cast<int64_t>(weights.size());
  SFPK_CHECK(
      layout.scalar_type() == ScalarType::Long && layout.is_contiguous() && layout.numel() == 3 * pieces, op,
      "layout", "three int64 numbers a piece", "others");
  const auto* numbers = static_cast<const int64_t*>(layout.const_data_ptr());
  std::vector<Weights> all;
  int64_t first = 0;
  for (int64_t p = 0; p < pieces; ++p) {
    const Tensor& w = weights[p];
    const Weights piece{static_cast<const char*>(w.const_data_ptr()),
                        kind_of(w, op, "weights"),
                        numbers[3 * p],
                        numbers[3 * p + 1],
                        numbers[3 * p + 2],
                        first};
    SFPK_CHECK(w.is_contiguous() && w.numel() == piece.count(), op, "weights", piece.count(), w.numel(),
               " contiguous weights");
    first += piece.groups;
    all.push_back(piece);
  }
  return all;
}

// Values of groups [0, groups) at the weights [begin, begin + count) they govern.
template <class T>
void spread(const T* groups, const Weights& piece, int64_t begin, int64_t count, T* out) {
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

class Mask {
 public:
  Mask(const Tensor& values, MaskKind kind, int64_t score, const std::optional<Tensor>& saliency,
       const std::optional<Tensor>& threshold, const std::optional<Tensor>& tie_end, const Tensor& segments)
      : n_(values.size(0)), mask_kind_(kind) {
    const char* op = "masked_weights_";
    SFPK_CHECK(values.dim() == 2 && (values.size(1) <= 1 || values.stride(1) == 1), op, "mask",
               "rows without gaps", "another tensor");
    data_ = static_cast<const char*>(values.const_data_ptr());
    row_bytes_ = values.stride(0) * static_cast<int64_t>(values.element_size());
    const auto type = values.scalar_type();
    SFPK_CHECK(
        segments.scalar_type() == ScalarType::Long && segments.is_contiguous() && segments.numel() >= 2, op,
        "segments", "int64 borders", "others");
    const auto* border = static_cast<const int64_t*>(segments.const_data_ptr());
    const int64_t parts = segments.numel() - 1;
    d_ = border[parts];
    if (kind == MaskKind::kBool) {
      SFPK_CHECK(type == ScalarType::Bool && values.size(1) == d_, op, "mask", "bools", "another mask");
    } else if (kind == MaskKind::kPacked) {
      const int64_t unit = 8 * static_cast<int64_t>(values.element_size());
      SFPK_CHECK(
          (type == ScalarType::Byte || type == ScalarType::Int) && values.size(1) == ceil_div(d_, unit), op,
          "mask", "packed bits", "another mask");
    } else {
      kind_ = kind_of(values, op, "mask");
      SFPK_CHECK(values.size(1) == d_, op, "mask", d_, values.size(1), " columns");
    }
    if (kind != MaskKind::kCut) return;
    SFPK_CHECK(threshold && tie_end && threshold->is_contiguous() && tie_end->is_contiguous() &&
                   threshold->scalar_type() == ScalarType::Float &&
                   tie_end->scalar_type() == ScalarType::Long && threshold->numel() == n_ * parts &&
                   tie_end->numel() == n_ * parts,
               op, "cut", "fp32 thresholds and int64 tie ends per row and segment", "others");
    const sfpk::Score ranks = sfpk::score_of(score, op, sfpk::Score::kAbsSaliency);
    const bool sized = sfpk::needs_saliency(ranks);
    SFPK_CHECK(!sized || (saliency && saliency->is_contiguous() && saliency->numel() == d_ &&
                          saliency->scalar_type() == ScalarType::Float),
               op, "saliency", "contiguous fp32, one per coordinate", "another");
    const auto* thresholds = static_cast<const float*>(threshold->const_data_ptr());
    const auto* ends = static_cast<const int64_t*>(tie_end->const_data_ptr());
    for (int64_t row = 0; row < n_; ++row) {
      Piece piece{};
      piece.values = data_ + row * row_bytes_;
      piece.kind = kind_;
      piece.score = ranks;
      piece.rows = 1;
      piece.count = d_;
      if (sized) piece.saliency = static_cast<const float*>(saliency->const_data_ptr());
      rows_.push_back(piece);
      cuts_.emplace_back();
      for (int64_t s = 0; s < parts; ++s)
        cuts_.back().push_back(
            {border[s + 1], {sfpk::key_from_float(thresholds[row * parts + s]), ends[row * parts + s]}});
    }
  }

  int64_t rows() const { return n_; }
  int64_t coordinates() const { return d_; }
  bool multiplies() const { return mask_kind_ == MaskKind::kFactors; }
  FloatKind kind() const { return kind_; }

  const char* factors(int64_t row, int64_t begin) const {
    return data_ + row * row_bytes_ + begin * bytes_of(kind_);
  }

  bool cuts() const { return mask_kind_ == MaskKind::kCut; }

  // f(block, entries) over the parts of coordinates [begin, begin + count) that one comparison decides.
  template <class F>
  void cut_blocks(int64_t row, int64_t begin, int64_t count, const F& f) const {
    const Piece& piece = rows_[row];
    sfpk::CutBlock block{};
    block.kind = kind_;
    block.absolute = piece.score != sfpk::Score::kValue;
    const auto& cuts = cuts_[row];
    auto segment = std::upper_bound(
        cuts.begin(), cuts.end(), begin,
        [](int64_t index, const sfpk::SegmentCut& candidate) { return index < candidate.end; });
    for (int64_t at = begin, end = begin + count; at < end;) {
      while (at >= segment->end) ++segment;
      const int64_t stop = std::min(end, segment->end);
      block.ties = at < segment->cut.tie_end;
      const int64_t next = block.ties ? std::min(stop, segment->cut.tie_end) : stop;
      block.threshold = sfpk::float_from_key(segment->cut.key);
      block.values = data_ + row * row_bytes_ + at * bytes_of(kind_);
      block.saliency = piece.saliency ? piece.saliency + at : nullptr;
      f(block, at - begin, next - at);
      at = next;
    }
  }

  // Bools of coordinates [begin, begin + count), count ≤ kBlock; in place or through `buffer`.
  const uint8_t* keep(int64_t row, int64_t begin, int64_t count, uint8_t* buffer) const {
    const auto* bytes = reinterpret_cast<const uint8_t*>(data_ + row * row_bytes_);
    if (mask_kind_ == MaskKind::kBool) return bytes + begin;
    if (mask_kind_ == MaskKind::kPacked)
      sfpk::unpack_bits(bytes, begin, count, buffer);
    else
      sfpk::keep_of(rows_[row], cuts_[row], begin, count, buffer);
    return buffer;
  }

 private:
  int64_t n_, d_ = 0;
  MaskKind mask_kind_;
  FloatKind kind_ = FloatKind::kFloat;
  const char* data_ = nullptr;
  int64_t row_bytes_ = 0;
  std::vector<Piece> rows_;
  std::vector<std::vector<sfpk::SegmentCut>> cuts_;
};

// f(piece, first weight, weights) over tiles of all pieces, shared out among the threads.
void for_tiles(const std::vector<Weights>& pieces, const std::function<void(size_t, int64_t, int64_t)>& f) {
  std::vector<int64_t> starts;  // first tile of each piece
  int64_t tiles = 0;
  for (const Weights& piece : pieces) {
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
    sfpk::masked_kernels().fence();
  });
}

// The groups' bools and factors of a piece that shares coordinates among weights, all rows.
struct Groups {
  std::vector<uint8_t> keep;
  std::vector<char> factors;
};

Groups groups_of(const Mask& mask, const Weights& piece) {
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
void apply(const Mask& mask, const Weights& piece, const Groups& groups, int64_t row, int64_t begin,
           int64_t count, char* out, FloatKind out_kind) {
  const auto& kernels = sfpk::masked_kernels();
  const char* from = piece.weights + begin * bytes_of(piece.kind);
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
                     const Tensor& segments, const Tensor& layout, std::vector<Tensor> out) {
  const char* op = "masked_weights_";
  const Mask mask(values, sfpk::mask_kind_of(mask_kind, op), score, saliency, threshold, tie_end, segments);
  const auto pieces = pieces_of(weights, layout, op);
  SFPK_CHECK(out.size() == pieces.size(), op, "out", pieces.size(), out.size(), " tensors");
  SFPK_CHECK(pieces.empty() || pieces.back().first + pieces.back().groups == mask.coordinates(), op, "layout",
             mask.coordinates(), "other", " coordinates");
  std::vector<Rows<char*>> to;
  std::vector<Groups> groups;
  for (size_t p = 0; p < pieces.size(); ++p) {
    check_rows(out[p], mask.rows(), pieces[p].count(), op, "out");
    const FloatKind kind = kind_of(out[p], op, "out");
    to.push_back({static_cast<char*>(out[p].mutable_data_ptr()), kind, out[p].stride(0) * bytes_of(kind)});
    groups.push_back(pieces[p].single() ? Groups{} : groups_of(mask, pieces[p]));
  }
  int64_t bytes = 0;
  for (size_t p = 0; p < pieces.size(); ++p) bytes += mask.rows() * pieces[p].count() * bytes_of(to[p].kind);
  const bool streams = bytes >= kStreamed;
  const auto& kernels = sfpk::masked_kernels();
  for_tiles(pieces, [&](size_t p, int64_t first, int64_t length) {
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

// Sums of the rounded products over the weights each group governs, groups [begin, end).
void sum_groups(const Weights& piece, const char* grads, FloatKind grad_kind, int64_t begin, int64_t end,
                float* out) {
  const auto& kernels = sfpk::masked_kernels();
  std::vector<double> sums(static_cast<size_t>(end - begin));
  float products[kBlock];
  const int64_t length = (end - begin) * piece.inner;
  for (int64_t o = 0; o < piece.outer; ++o) {
    const int64_t row = (o * piece.groups + begin) * piece.inner;
    for (int64_t e = 0; e < length; e += kBlock) {
      const int64_t count = std::min(kBlock, length - e);
      kernels.scale(piece.weights + (row + e) * bytes_of(piece.kind), piece.kind,
                    grads + (row + e) * bytes_of(grad_kind), grad_kind, count, products, FloatKind::kFloat);
      if (piece.inner == 1) {
        for (int64_t i = 0; i < count; ++i) sums[e + i] += products[i];
        continue;
      }
      for (int64_t i = 0; i < count;) {
        const int64_t g = (e + i) / piece.inner, stop = std::min(count, (g + 1) * piece.inner - e);
        double sum = sums[g];  // one chain of additions, wherever blocks and threads begin
        for (; i < stop; ++i) sum += products[i];
        sums[g] = sum;
      }
    }
  }
  for (int64_t g = begin; g < end; ++g) out[g] = static_cast<float>(sums[g - begin]);
}

void mask_gradient_(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                    const Tensor& layout, Tensor out) {
  const char* op = "mask_gradient_";
  const auto pieces = pieces_of(weights, layout, op);
  SFPK_CHECK(grads.size() == pieces.size(), op, "grads", pieces.size(), grads.size(), " tensors");
  const int64_t d = pieces.empty() ? 0 : pieces.back().first + pieces.back().groups;
  SFPK_CHECK(out.dim() == 2 && out.size(1) == d && (d <= 1 || out.stride(1) == 1) &&
                 out.scalar_type() == ScalarType::Float,
             op, "out", "fp32 (rows, coordinates)", "another tensor");
  const int64_t n = out.size(0);
  auto* result = static_cast<float*>(out.mutable_data_ptr());
  const auto& kernels = sfpk::masked_kernels();
  std::vector<Weights> singles, shared;
  std::vector<Rows<const char*>> of_singles, of_shared;
  for (size_t p = 0; p < pieces.size(); ++p) {
    check_rows(grads[p], n, pieces[p].count(), op, "grads");
    const FloatKind kind = kind_of(grads[p], op, "grads");
    const Rows<const char*> rows{static_cast<const char*>(grads[p].const_data_ptr()), kind,
                                 grads[p].stride(0) * bytes_of(kind)};
    (pieces[p].single() ? singles : shared).push_back(pieces[p]);
    (pieces[p].single() ? of_singles : of_shared).push_back(rows);
  }
  for_tiles(singles, [&](size_t p, int64_t first, int64_t length) {
    const Weights& piece = singles[p];
    for (int64_t row = 0; row < n; ++row)
      for (int64_t begin = first; begin < first + length; begin += kBlock)
        kernels.scale(piece.weights + begin * bytes_of(piece.kind), piece.kind, of_singles[p].at(row, begin),
                      of_singles[p].kind, std::min(kBlock, first + length - begin),
                      result + row * out.stride(0) + piece.first + begin, FloatKind::kFloat);
  });
  for (size_t p = 0; p < shared.size(); ++p) {
    const Weights& piece = shared[p];
    // A thread owns groups, so that the sums have one order whatever the number of threads.
    const int64_t grain = std::max<int64_t>(1, kGrain * kBlock / (piece.outer * piece.inner));
    for (int64_t row = 0; row < n; ++row)
      torch::stable::parallel_for(0, piece.groups, grain, [&](int64_t begin, int64_t end) {
        sum_groups(piece, of_shared[p].at(row, 0), of_shared[p].kind, begin, end,
                   result + row * out.stride(0) + piece.first);
      });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CPU, m) {
  m.impl("masked_weights_", TORCH_BOX(&masked_weights_));
  m.impl("mask_gradient_", TORCH_BOX(&mask_gradient_));
}
