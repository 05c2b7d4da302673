// The n x n algebra between the transition's two passes, in fp64.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace sfpk {

struct Settings {
  double step, radius, repulsion;
  bool weighted;  // kernel "weighted_rbf"
  bool squared;   // density "l2_squared"
  std::optional<double> target_density;
  double consensus, eps;
};

// The statistics of the particles, as the Python side knows them (TransitionStats without the cosines).
struct State {
  std::vector<double> densities, norms, slope_norms, saliency_norms;  // (n)
  std::vector<double> sq_distances;                                   // (n, n)
};

// The coefficients of the update pass, one per particle: u = g - slope * s, m += keep m + radial s +
// tangential u, then m += after_pull m where the particles are pulled to their mean.
struct Moves {
  std::vector<double> cosines;               // between the move and -dL/dm
  std::vector<float> slope_high, slope_low;  // the slope in two floats
  std::vector<float> keep, radial, tangential, after_pull;
};

// From the sums of an update pass. `total` is the number of governed weights D.
State state_from(const std::vector<double>& sums, int64_t n, bool sized, double total,
                 const Settings& settings);

// Repulsion as a mix of particles (n, n): lambda (2 / (n h_ij)) kappa_ij as a graph Laplacian.
std::vector<float> repulsion_mix(const State& state, int64_t n, int64_t d, const Settings& settings);

// From the sums of a reduce pass that accumulated u = g - guess * s; `grams`: with the Gram matrices. The
// coefficients of skipped particles are zeros, their cosines NaN.
Moves plan_moves(const State& old, const std::vector<double>& sums, const std::vector<float>& guess,
                 const std::vector<char>& skipped, int64_t n, bool sized, bool grams, double total,
                 const Settings& settings);

}  // namespace sfpk
