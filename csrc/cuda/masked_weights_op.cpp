// masked_weights_device_ and mask_gradient_device_: θ ⊙ mask on the GPU, and its derivative.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "arguments.h"
#include "integers.h"
#include "layout.h"
#include "masked_weights.h"
#include "stream.h"

namespace {

using namespace sfpk;
using namespace sfpk::cuda;

// The pieces of weights on the device of the first.
std::vector<Piece> device_pieces(const std::vector<Tensor>& weights, const std::vector<int64_t>& layout,
                                 int64_t coordinates, const char* op) {
  const auto pieces = pieces_of(weights, layout, coordinates, op);
  for (const Tensor& w : weights) check_device(w, weights[0], op, "weights");
  return pieces;
}

void masked_weights_device_(const std::vector<Tensor>& weights, const Tensor& values, int64_t kind,
                            int64_t score, const std::optional<Tensor>& saliency,
                            const std::optional<Tensor>& threshold, const std::optional<Tensor>& tie_end,
                            const Tensor& borders,  // (segments + 1) on the device
                            std::vector<int64_t> layout, int64_t coordinates, std::vector<Tensor> out) {
  const char* op = "masked_weights_device_";
  const auto pieces = device_pieces(weights, layout, coordinates, op);
  const Tensor& first = weights[0];
  const int64_t d = coordinates, n = values.size(0), segments = borders.numel() - 1;
  SFPK_CHECK(segments >= 1, op, "borders", "at least two", borders.numel());
  Mask mask{};
  mask.kind = mask_kind_of(kind, op);
  mask.bits = 8 * static_cast<int>(values.element_size());
  check_rows(values, first, n, mask.kind == MaskKind::kPacked ? ceil_div(d, mask.bits) : d, op, "mask");
  const bool floats = mask.kind == MaskKind::kFactors || mask.kind == MaskKind::kCut;
  mask.values = {values.data_ptr(), floats ? kind_of(values, op, "mask") : FloatKind::kFloat,
                 values.stride(0)};
  mask.borders = data_of<int64_t>(borders, first, ScalarType::Long, segments + 1, op, "borders");
  mask.segments = segments;
  if (mask.kind == MaskKind::kCut) {
    mask.score = score_of(score, op, Score::kValueSaliency);
    SFPK_CHECK(threshold && tie_end && (saliency || !needs_saliency(mask.score)), op, "cut",
               "thresholds, tie ends and what their score needs", "others");
    mask.threshold = data_of<float>(*threshold, first, ScalarType::Float, n * segments, op, "threshold");
    mask.tie_end = data_of<int64_t>(*tie_end, first, ScalarType::Long, n * segments, op, "tie_end");
    if (needs_saliency(mask.score))
      mask.saliency = data_of<float>(*saliency, first, ScalarType::Float, d, op, "saliency");
  }
  SFPK_CHECK(out.size() == pieces.size(), op, "out", pieces.size(), out.size(), " tensors");
  const OnDeviceOf device(first);
  for (size_t p = 0; p < pieces.size(); ++p) {
    check_rows(out[p], first, n, weights[p].numel(), op, "out");
    masked_weights(pieces[p], mask, n, out[p].data_ptr(), kind_of(out[p], op, "out"), out[p].stride(0),
                   device.stream());
  }
}

// out (rows, coordinates): fp32 is written where a piece governs, and no two may share a coordinate; to fp64
// the sums of all pieces are added, piece after piece.
void mask_gradient_device_(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                           std::vector<int64_t> layout, Tensor out) {
  const char* op = "mask_gradient_device_";
  SFPK_CHECK(out.dim() == 2, op, "out", "shape (rows, coordinates)", "another");
  const int64_t n = out.size(0), stride = out.stride(0);
  const auto pieces = device_pieces(weights, layout, out.size(1), op);
  const Tensor& first = weights[0];
  check_rows(out, first, n, out.size(1), op, "out");
  const auto type = out.scalar_type();
  SFPK_CHECK(type == ScalarType::Float || type == ScalarType::Double, op, "out", "fp32 or fp64",
             "another dtype");
  SFPK_CHECK(type == ScalarType::Double || !shares_coordinates(pieces), op, "out",
             "fp64 for pieces that share coordinates", "fp32");
  SFPK_CHECK(grads.size() == pieces.size(), op, "grads", pieces.size(), grads.size(), " tensors");
  const OnDeviceOf device(first);
  for (size_t p = 0; p < pieces.size(); ++p) {
    check_rows(grads[p], first, n, weights[p].numel(), op, "grads");
    const Rows rows{grads[p].data_ptr(), kind_of(grads[p], op, "grads"), grads[p].stride(0)};
    if (type == ScalarType::Double)
      mask_gradient<double>(pieces[p], rows, n, {static_cast<double*>(out.data_ptr()), stride},
                            device.stream());
    else
      mask_gradient<float>(pieces[p], rows, n, {static_cast<float*>(out.data_ptr()), stride},
                           device.stream());
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CUDA, m) {
  m.impl("masked_weights_device_", TORCH_BOX(&masked_weights_device_));
  m.impl("mask_gradient_device_", TORCH_BOX(&mask_gradient_device_));
}
