// transition_: the fused SFPK transition on the CPU. One reduce pass (reads M and G), the n x n algebra in
// fp64, one update pass (reads M and G, writes M), which also measures the moved particles for the next call.
// The stages alone are in transition_stages.cpp.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "transition_problem.h"

namespace {

using sfpk::OptionalTensor;
using torch::stable::Tensor;

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Returns TransitionStats. The cosine of a particle whose gradient is not finite is NaN; it has not moved,
// and unless `skip` neither has any other.
Result transition_(Tensor masks, const Tensor& grads, const OptionalTensor& weights,
                   const OptionalTensor& saliency, const OptionalTensor& sizes, OptionalTensor residual,
                   const std::vector<Tensor>& state, double step, double radius, double repulsion,
                   bool weighted, bool squared, std::optional<double> target_density, double consensus,
                   double eps, int64_t key, bool skip, int64_t only, std::optional<double> angle) {
  SFPK_CHECK(!weighted || saliency, "transition_", "saliency", "a vector with the weighted kernel", "none");
  const std::optional<Tensor> none;
  sfpk::Problem p = sfpk::problem_of(masks, residual, {weights, weighted ? saliency : none, sizes});
  const int64_t n = p.n, d = p.d;
  SFPK_CHECK(d > 0, "transition_", "masks", "shape (n >= 1, d >= 1)", "d = 0");
  double total = static_cast<double>(d);
  if (p.sizes) {
    total = 0.0;
    for (int64_t e = 0; e < d; ++e) total += static_cast<double>(p.sizes[e]);
  }

  const auto measured = [&] { return sfpk::state_from(sfpk::update_sums(p), n, total, weighted, squared); };
  const sfpk::State old = state.empty() ? measured() : sfpk::read_state(state, n);

  std::vector<float> mix;
  if (repulsion > 0.0 && n > 1)
    mix = sfpk::repulsion_mix(old.saliency_norms.data(), old.sq_distances.data(), n, d, repulsion, weighted);
  sfpk::add_gradients(p, grads, only, mix.empty() ? nullptr : mix.data());

  const sfpk::Settings settings{step,      radius, weighted, squared, target_density,
                                consensus, eps,    skip,     only,    angle};
  const auto guess = sfpk::guess_from(sfpk::sample_sums(p), n);
  const auto sums = sfpk::reduce_sums(p, guess, sfpk::wants_grams(settings, n));
  const auto plan = sfpk::plan_moves(old, sums, guess, n, p.sizes != nullptr, total, settings);

  const auto pack = [&](const sfpk::State& s) {
    using sfpk::fp64_tensor;
    return Result{fp64_tensor(masks, s.densities, {n}),       fp64_tensor(masks, s.norms, {n}),
                  fp64_tensor(masks, s.slope_norms, {n}),     fp64_tensor(masks, s.saliency_norms, {n}),
                  fp64_tensor(masks, s.sq_distances, {n, n}), fp64_tensor(masks, plan.cosines, {n})};
  };
  if (plan.stops) return pack(old);
  const sfpk::NarrowMoves moves(plan.coefficients.data(), n);
  moves.move(p, consensus, static_cast<uint64_t>(key));
  return pack(measured());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CPU, m) { m.impl("transition_", TORCH_BOX(&transition_)); }
