// average_gradients_: averages of gradients over steps, and what is measured of the gradients, in one pass.
#include "averaging.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "integers.h"
#include "isa.h"
#include "received.h"

namespace {

using sfpk::ceil_div;
using sfpk::FloatKind;
using sfpk::GradientPiece;
using sfpk::kGradientSums;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "average_gradients_";
constexpr int64_t kLeastColumns = 1 << 14;  // that are worth a thread
constexpr int64_t kMostChunks = 512;        // of a row

sfpk::AveragePiece average_piece_for_this_cpu() {
#if defined(__x86_64__)
  switch (sfpk::cpu_isa()) {
    case sfpk::Isa::kAvx512:
      return sfpk::avx512::average_piece;
    case sfpk::Isa::kAvx2:
      return sfpk::avx2::average_piece;
    default:
      break;
  }
#endif
  return sfpk::baseline::average_piece;
}

bool is_exact(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

void check_rows(const Tensor& t, const Tensor& like, const char* name) {
  SFPK_CHECK(t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == like.size(1) &&
                 (t.size(1) <= 1 || t.stride(1) == 1) && t.scalar_type() == like.scalar_type(),
             kOp, name, "(rows, d) without gaps, of one dtype", "another tensor");
}

// The cosines and effective dimensions, (rows,) fp64 each.
//
// Columns are cut into chunks that depend on d alone, each with its own sums, added in order: the same bits
// whatever the number of threads.
std::tuple<Tensor, Tensor> average_gradients_(Tensor grads, const std::optional<Tensor>& averages,
                                              const Tensor& weights, double beta) {
  SFPK_CHECK(grads.dim() == 2, kOp, "grads", "shape (rows, d)", grads.dim(), " dimensions");
  check_rows(grads, grads, "grads");
  if (averages) check_rows(*averages, grads, "averages");
  const int64_t n = grads.size(0), d = grads.size(1), size = grads.element_size();
  SFPK_CHECK(weights.is_contiguous() && weights.numel() == d && is_exact(weights) == is_exact(grads), kOp,
             "weights", "d contiguous entries, fp64 beside fp64 gradients alone", "another tensor");
  GradientPiece all{};
  all.exact = is_exact(grads);
  if (!all.exact) {
    all.kind = sfpk::kind_of(grads, kOp, "grads");
    all.weights_kind = sfpk::kind_of(weights, kOp, "weights");
  }
  all.beta = beta;
  auto* to =
      static_cast<char*>(beta > 0.0 ? grads.mutable_data_ptr() : const_cast<void*>(grads.const_data_ptr()));
  const auto* from = averages ? static_cast<const char*>(averages->const_data_ptr()) : nullptr;
  const auto* by = static_cast<const char*>(weights.const_data_ptr());
  const int64_t row_bytes = grads.stride(0) * size, average_bytes = averages ? averages->stride(0) * size : 0;
  const int64_t chunk = std::max(
      kLeastColumns, ceil_div(ceil_div(d, kMostChunks), sfpk::kAveragingBlock) * sfpk::kAveragingBlock);
  const int64_t chunks = ceil_div(d, chunk);
  std::vector<double> slots(static_cast<size_t>(n * chunks * kGradientSums), 0.0);
  const auto average_piece = average_piece_for_this_cpu();
  torch::stable::parallel_for(0, n * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = k / chunks, column = k % chunks * chunk;
      GradientPiece piece = all;
      piece.grads = to + row * row_bytes + column * size;
      piece.averages = from ? from + row * average_bytes + column * size : nullptr;
      piece.weights = by + column * static_cast<int64_t>(weights.element_size());
      piece.count = std::min(chunk, d - column);
      average_piece(piece, slots.data() + k * kGradientSums);
    }
  });
  Tensor cosines = torch::stable::new_empty(grads, {n}, ScalarType::Double);
  Tensor dimensions = torch::stable::new_empty(grads, {n}, ScalarType::Double);
  auto* cosine = static_cast<double*>(cosines.mutable_data_ptr());
  auto* dimension = static_cast<double*>(dimensions.mutable_data_ptr());
  for (int64_t row = 0; row < n; ++row) {
    double sums[kGradientSums] = {};
    for (int64_t k = row * chunks; k < (row + 1) * chunks; ++k)
      for (int64_t s = 0; s < kGradientSums; ++s) sums[s] += slots[k * kGradientSums + s];
    cosine[row] = sums[0] / (std::sqrt(sums[1]) * std::sqrt(sums[2]));
    dimension[row] = sums[1] * sums[1] / (static_cast<double>(d) * sums[3]);
  }
  return {cosines, dimensions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CPU, m) { m.impl("average_gradients_", TORCH_BOX(&average_gradients_)); }
