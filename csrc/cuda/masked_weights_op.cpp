// masked_weights_device_ and mask_gradient_device_: θ ⊙ mask on the GPU, and its derivative.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "arguments.h"
#include "integers.h"
#include "masked_weights.h"
#include "stream.h"

namespace {

using namespace sfpk;
using namespace sfpk::cuda;

std::vector<Weights> pieces_of(const std::vector<Tensor>& weights, const std::vector<int64_t>& layout,
                               const char* op) {
  SFPK_CHECK(!weights.empty() && layout.size() == 3 * weights.size(), op, "layout", "three numbers a piece",
             "others");
  std::vector<Weights> all;
  int64_t first = 0;
  for (size_t p = 0; p < weights.size(); ++p) {
    const Tensor& w = weights[p];
    const Weights piece{w.data_ptr(),      kind_of(w, op, "weights"), layout[3 * p],
                        layout[3 * p + 1], layout[3 * p + 2],         first};
    check_device(w, weights[0], op, "weights");
    SFPK_CHECK(w.is_contiguous() && w.numel() == piece.outer * piece.groups * piece.inner, op, "weights",
               piece.outer * piece.groups * piece.inner, w.numel(), " contiguous weights");
    first += piece.groups;
    all.push_back(piece);
  }
  return all;
}

int64_t coordinates_of(const std::vector<Weights>& pieces) {
  return pieces.back().first + pieces.back().groups;
}

void masked_weights_device_(const std::vector<Tensor>& weights, const Tensor& values, int64_t kind,
                            int64_t score, const std::optional<Tensor>& saliency,
                            const std::optional<Tensor>& threshold, const std::optional<Tensor>& tie_end,
                            const Tensor& borders,  // (segments + 1) on the device
                            std::vector<int64_t> layout, std::vector<Tensor> out) {
  const char* op = "masked_weights_device_";
  const auto pieces = pieces_of(weights, layout, op);
  const Tensor& first = weights[0];
  const int64_t d = coordinates_of(pieces), n = values.size(0), segments = borders.numel() - 1;
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
    mask.score = score_of(score, op, Score::kAbsSaliency);
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

void mask_gradient_device_(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                           std::vector<int64_t> layout, Tensor out) {
  const char* op = "mask_gradient_device_";
  const auto pieces = pieces_of(weights, layout, op);
  const Tensor& first = weights[0];
  const int64_t n = out.size(0);
  check_rows(out, first, n, coordinates_of(pieces), op, "out");
  SFPK_CHECK(out.scalar_type() == ScalarType::Float, op, "out", "fp32", "another dtype");
  SFPK_CHECK(grads.size() == pieces.size(), op, "grads", pieces.size(), grads.size(), " tensors");
  const OnDeviceOf device(first);
  for (size_t p = 0; p < pieces.size(); ++p) {
    check_rows(grads[p], first, n, weights[p].numel(), op, "grads");
    const Rows rows{grads[p].data_ptr(), kind_of(grads[p], op, "grads"), grads[p].stride(0)};
    mask_gradient(pieces[p], rows, n, static_cast<float*>(out.data_ptr()), out.stride(0), device.stream());
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CUDA, m) {
  m.impl("masked_weights_device_", TORCH_BOX(&masked_weights_device_));
  m.impl("mask_gradient_device_", TORCH_BOX(&mask_gradient_device_));
}
