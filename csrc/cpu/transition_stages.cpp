// The stages of the transition as ops: what transition.cpp does in one call, with a seam after each sum over
// coordinates, so that those of several shards can be added. Shapes as in ops/transition/stages.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "transition_problem.h"

namespace {

using sfpk::OptionalTensor;
using sfpk::Problem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The particles and their gradients, with the repulsion of `mix`, (n, n) fp32, where it is given.
Problem with_gradients(const Tensor& masks, const OptionalTensor& residual, const Tensor& grads,
                       const sfpk::Columns& columns, const OptionalTensor& mix, int64_t only) {
  Problem p = sfpk::problem_of(masks, residual, columns);
  SFPK_CHECK(
      !mix || (mix->scalar_type() == ScalarType::Float && mix->is_contiguous() && mix->numel() == p.n * p.n),
      "transition_", "mix", "a contiguous (n, n) fp32 matrix", "another");
  sfpk::add_gradients(p, grads, only, mix ? static_cast<const float*>(mix->const_data_ptr()) : nullptr);
  return p;
}

Tensor measure(const Tensor& masks, const OptionalTensor& residual, const OptionalTensor& saliency,
               const OptionalTensor& sizes) {
  const OptionalTensor none;
  const Problem p = sfpk::problem_of(masks, residual, {none, saliency, sizes});
  return sfpk::fp64_tensor(masks, sfpk::update_sums(p), {sfpk::kUpdateSums + p.n, p.n});
}

Tensor mix(const Tensor& saliency_norms, const Tensor& sq_distances, int64_t d, double repulsion,
           bool weighted) {
  const int64_t n = saliency_norms.numel();
  const auto norms = sfpk::read_fp64(saliency_norms, n, "state");
  const auto distances = sfpk::read_fp64(sq_distances, n * n, "state");
  const auto values = sfpk::repulsion_mix(norms.data(), distances.data(), n, d, repulsion, weighted);
  Tensor out = torch::stable::new_empty(sq_distances, {n, n}, ScalarType::Float);
  std::copy(values.begin(), values.end(), static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

Tensor sample(const Tensor& masks, const OptionalTensor& residual, const Tensor& grads,
              const OptionalTensor& weights, const OptionalTensor& saliency, const OptionalTensor& sizes,
              const OptionalTensor& mix, int64_t only) {
  const Problem p = with_gradients(masks, residual, grads, {weights, saliency, sizes}, mix, only);
  return sfpk::fp64_tensor(masks, sfpk::sample_sums(p), {2, p.n});
}

Tensor sums(const Tensor& masks, const OptionalTensor& residual, const Tensor& grads,
            const OptionalTensor& weights, const OptionalTensor& saliency, const OptionalTensor& sizes,
            const OptionalTensor& mix, int64_t only, const Tensor& sample, bool grams) {
  const Problem p = with_gradients(masks, residual, grads, {weights, saliency, sizes}, mix, only);
  const auto guess = sfpk::guess_from(sfpk::read_fp64(sample, 2 * p.n, "sample"), p.n);
  const int64_t rows = sfpk::kReduceSums + (grams ? sfpk::kGrams * p.n : 0);
  return sfpk::fp64_tensor(masks, sfpk::reduce_sums(p, guess, grams), {rows, p.n});
}

std::tuple<Tensor, Tensor> plan(const std::vector<Tensor>& state, const Tensor& sample, const Tensor& sums,
                                double total, bool sized, double step, double radius, bool weighted,
                                bool squared, std::optional<double> target_density, double consensus,
                                double eps, bool skip, int64_t only, std::optional<double> angle) {
  const sfpk::Settings settings{step,      radius, weighted, squared, target_density,
                                consensus, eps,    skip,     only,    angle};
  SFPK_CHECK(sample.dim() == 2, "transition_plan", "sample", "shape (2, n)", sample.dim(), " dimensions");
  const int64_t n = sample.size(1);
  const int64_t size = sfpk::kReduceSums * n + (sfpk::wants_grams(settings, n) ? sfpk::kGrams * n * n : 0);
  const auto guess = sfpk::guess_from(sfpk::read_fp64(sample, 2 * n, "sample"), n);
  const auto moves = sfpk::plan_moves(sfpk::read_state(state, n), sfpk::read_fp64(sums, size, "sums"), guess,
                                      n, sized, total, settings);
  return {sfpk::fp64_tensor(sums, moves.coefficients, {sfpk::kCoefficients, n}),
          sfpk::fp64_tensor(sums, moves.cosines, {n})};
}

Tensor apply_(Tensor masks, OptionalTensor residual, const Tensor& grads, const OptionalTensor& weights,
              const OptionalTensor& saliency, const OptionalTensor& sizes, const OptionalTensor& mix,
              int64_t only, const Tensor& coefficients, double consensus, int64_t key, int64_t first_column) {
  Problem p = with_gradients(masks, residual, grads, {weights, saliency, sizes}, mix, only);
  const auto values = sfpk::read_fp64(coefficients, sfpk::kCoefficients * p.n, "coefficients");
  const sfpk::NarrowMoves moves(values.data(), p.n);
  moves.move(p, consensus, static_cast<uint64_t>(key));
  p.first_column = first_column;
  return sfpk::fp64_tensor(masks, sfpk::update_sums(p), {sfpk::kUpdateSums + p.n, p.n});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> stats(const Tensor& sums, double total, bool weighted,
                                                         bool squared) {
  SFPK_CHECK(sums.dim() == 2, "transition_stats", "sums", "shape (4 + n, n)", sums.dim(), " dimensions");
  const int64_t n = sums.size(1);
  const auto values = sfpk::read_fp64(sums, sfpk::kUpdateSums * n + n * n, "sums");
  const auto s = sfpk::state_from(values, n, total, weighted, squared);
  using sfpk::fp64_tensor;
  return {fp64_tensor(sums, s.densities, {n}), fp64_tensor(sums, s.norms, {n}),
          fp64_tensor(sums, s.slope_norms, {n}), fp64_tensor(sums, s.saliency_norms, {n}),
          fp64_tensor(sums, s.sq_distances, {n, n})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CPU, m) {
  m.impl("transition_measure", TORCH_BOX(&measure));
  m.impl("transition_mix", TORCH_BOX(&mix));
  m.impl("transition_sample", TORCH_BOX(&sample));
  m.impl("transition_sums", TORCH_BOX(&sums));
  m.impl("transition_plan", TORCH_BOX(&plan));
  m.impl("transition_apply_", TORCH_BOX(&apply_));
  m.impl("transition_stats", TORCH_BOX(&stats));
}
