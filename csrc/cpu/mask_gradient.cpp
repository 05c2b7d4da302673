// mask_gradient_: the derivative of θ ⊙ mask by the mask, Σ θ_w · ∂L/∂W_w over the weights of each
// coordinate.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "masked_rows.h"
#include "masked_weights.h"

namespace {

using sfpk::bytes_of;
using sfpk::FloatKind;
using sfpk::kBlock;
using sfpk::Piece;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 8 * kBlock;  // weights that are worth a thread

using Gradients = sfpk::Rows<const char*>;

const char* weights_at(const Piece& piece, int64_t begin) {
  return static_cast<const char*>(piece.weights) + begin * bytes_of(piece.kind);
}

// Rows of results, `stride` entries apart: fp32 is written, fp64 added to.
template <class Float>
struct Results {
  Float* data;
  int64_t rows, stride;
  Float* at(int64_t row, int64_t coordinate) const { return data + row * stride + coordinate; }
};

// Pieces of single weights. Those that are added must come one by one, as they may share coordinates.
template <class Float>
void single_products(const std::vector<Piece>& pieces, const std::vector<Gradients>& grads,
                     const Results<Float>& out) {
  const auto& kernels = sfpk::masked_kernels();
  sfpk::for_tiles(pieces, [&](size_t p, int64_t first, int64_t length) {
    const Piece& piece = pieces[p];
    for (int64_t row = 0; row < out.rows; ++row)
      for (int64_t begin = first; begin < first + length; begin += kBlock) {
        const int64_t count = std::min(kBlock, first + length - begin);
        Float* to = out.at(row, piece.first + begin);
        const auto multiply = [&](float* products) {
          kernels.scale(weights_at(piece, begin), piece.kind, grads[p].at(row, begin), grads[p].kind, count,
                        products, FloatKind::kFloat);
        };
        if constexpr (std::is_same_v<Float, float>) {
          multiply(to);
        } else {
          float products[kBlock];
          multiply(products);
          for (int64_t e = 0; e < count; ++e) to[e] += products[e];
        }
      }
  });
}

constexpr int64_t kAbreast = 4;  // groups whose chains of additions do not wait for one another

// Adds `inner` products to the sum of each of kAbreast groups, one after the other.
void add_abreast(const float* products, int64_t inner, double* sums) {
  double a = sums[0], b = sums[1], c = sums[2], d = sums[3];
  for (int64_t i = 0; i < inner; ++i) {
    a += products[i];
    b += products[inner + i];
    c += products[2 * inner + i];
    d += products[3 * inner + i];
  }
  sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
}

// Adds the rounded products over the weights each group governs, groups [begin, end), to sums[group - begin].
void add_groups(const Piece& piece, const char* grads, FloatKind grad_kind, int64_t begin, int64_t end,
                double* sums) {
  const auto& kernels = sfpk::masked_kernels();
  float products[kBlock];
  const int64_t length = (end - begin) * piece.inner;
  for (int64_t o = 0; o < piece.outer; ++o) {
    const int64_t row = (o * piece.groups + begin) * piece.inner;
    for (int64_t e = 0; e < length; e += kBlock) {
      const int64_t count = std::min(kBlock, length - e);
      kernels.scale(weights_at(piece, row + e), piece.kind, grads + (row + e) * bytes_of(grad_kind),
                    grad_kind, count, products, FloatKind::kFloat);
      if (piece.inner == 1) {
        for (int64_t i = 0; i < count; ++i) sums[e + i] += products[i];
        continue;
      }
      int64_t g = e / piece.inner, stop = (g + 1) * piece.inner - e;
      for (int64_t i = 0; i < count; ++g, stop += piece.inner) {
        if (i + kAbreast * piece.inner <= count && stop - i == piece.inner) {
          add_abreast(products + i, piece.inner, sums + g);
          i += kAbreast * piece.inner;
          g += kAbreast - 1;
          stop = i;
          continue;
        }
        double sum = sums[g];  // one chain of additions, wherever blocks and threads begin
        for (const int64_t last = std::min(count, stop); i < last; ++i) sum += products[i];
        sums[g] = sum;
      }
    }
  }
}

// A piece whose coordinates govern several weights. A thread owns groups, so that the sums have one order
// whatever the number of threads.
template <class Float>
void group_sums(const Piece& piece, const Gradients& grads, const Results<Float>& out) {
  const int64_t grain = std::max<int64_t>(1, kGrain / (piece.outer * piece.inner));
  for (int64_t row = 0; row < out.rows; ++row)
    torch::stable::parallel_for(0, piece.groups, grain, [&](int64_t begin, int64_t end) {
      Float* to = out.at(row, piece.first + begin);
      if constexpr (std::is_same_v<Float, double>) {
        add_groups(piece, grads.at(row, 0), grads.kind, begin, end, to);
      } else {
        std::vector<double> sums(static_cast<size_t>(end - begin));
        add_groups(piece, grads.at(row, 0), grads.kind, begin, end, sums.data());
        for (int64_t g = 0; g < end - begin; ++g) to[g] = static_cast<float>(sums[g]);
      }
    });
}

// Pieces that share no coordinate: those of single weights at once, the others one after the other.
void write(const std::vector<Piece>& pieces, const std::vector<Gradients>& grads, const Results<float>& out) {
  std::vector<Piece> singles;
  std::vector<Gradients> of_singles;
  for (size_t p = 0; p < pieces.size(); ++p) {
    if (!pieces[p].single()) continue;
    singles.push_back(pieces[p]);
    of_singles.push_back(grads[p]);
  }
  single_products(singles, of_singles, out);
  for (size_t p = 0; p < pieces.size(); ++p)
    if (!pieces[p].single()) group_sums(pieces[p], grads[p], out);
}

// Piece after piece, in the order of the layout.
void add(const std::vector<Piece>& pieces, const std::vector<Gradients>& grads, const Results<double>& out) {
  for (size_t p = 0; p < pieces.size(); ++p) {
    if (pieces[p].single())
      single_products<double>({pieces[p]}, {grads[p]}, out);
    else
      group_sums(pieces[p], grads[p], out);
  }
}

// out (rows, coordinates): fp32 is written where a piece governs, and no two may share a coordinate; to fp64
// the sums of all pieces are added.
void mask_gradient_(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                    std::vector<int64_t> layout, Tensor out) {
  const char* op = "mask_gradient_";
  const auto type = out.scalar_type();
  SFPK_CHECK(out.dim() == 2 && (out.size(1) <= 1 || out.stride(1) == 1) &&
                 (type == ScalarType::Float || type == ScalarType::Double),
             op, "out", "fp32 or fp64 (rows, coordinates)", "another tensor");
  const int64_t n = out.size(0), stride = out.stride(0);
  const auto pieces = sfpk::pieces_of(weights, layout, out.size(1), op);
  SFPK_CHECK(grads.size() == pieces.size(), op, "grads", pieces.size(), grads.size(), " tensors");
  std::vector<Gradients> rows;
  for (size_t p = 0; p < pieces.size(); ++p)
    rows.push_back(sfpk::rows_of<const char*>(grads[p], n, pieces[p].count(), op, "grads"));
  if (type == ScalarType::Double) {
    add(pieces, rows, {static_cast<double*>(out.mutable_data_ptr()), n, stride});
    return;
  }
  SFPK_CHECK(!sfpk::shares_coordinates(pieces), op, "out", "fp64 for pieces that share coordinates", "fp32");
  write(pieces, rows, {static_cast<float*>(out.mutable_data_ptr()), n, stride});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CPU, m) { m.impl("mask_gradient_", TORCH_BOX(&mask_gradient_)); }
