// The n x n algebra between the transition's two passes, in fp64.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace sfpk {

struct Settings {
  double step, radius;
  bool weighted;  // kernel "weighted_rbf"
  bool squared;   // density "l2_squared"
  std::optional<double> target_density;
  double consensus, eps;
  bool skip;                    // particles move although the gradient of another one is not finite
  int64_t only;                 // the one particle that moves, -1 for all
  std::optional<double> angle;  // of the tangential part, in place of the radius
};

// The statistics of the particles, as the Python side knows them (TransitionStats without the cosines).
struct State {
  std::vector<double> densities, norms, slope_norms, saliency_norms;  // (n)
  std::vector<double> sq_distances;                                   // (n, n)
};

// What the update pass does with each particle, a row of n numbers each: u = g - slope * s, m += keep m +
// radial s + tangential u, then m += after_pull m where the particles are pulled to their mean; particles
// whose kSkipped is 1 stay.
enum Coefficient { kSlope, kKeep, kRadial, kTangential, kAfterPull, kSkipped, kCoefficients };

struct Moves {
  std::vector<double> coefficients;  // (kCoefficients, n)
  std::vector<double> cosines;       // (n): between the move and -dL/dm; NaN where the gradient is not finite
  bool stops;                        // nothing moves, as a gradient is not finite

  const double* row(Coefficient which, int64_t n) const { return coefficients.data() + which * n; }
};

// From the sums of an update pass. `total` is the number of governed weights D.
State state_from(const std::vector<double>& sums, int64_t n, double total, bool weighted, bool squared);

// Repulsion as a mix of particles (n, n): lambda (2 / (n h_ij)) kappa_ij as a graph Laplacian.
std::vector<float> repulsion_mix(const double* saliency_norms, const double* sq_distances, int64_t n,
                                 int64_t d, double repulsion, bool weighted);

// How far g leans on the slope s = c*m, from the sums c s.g and c s.s of a sample, (2, n). Summing
// u = g - guess * s instead of g keeps the digits of the norm of u when g is nearly parallel to s.
std::vector<float> guess_from(const std::vector<double>& sample, int64_t n);

// Whether the reduce pass has to sum the Gram matrices.
bool wants_grams(const Settings& settings, int64_t n);

// From the sums of a reduce pass that accumulated u = g - guess * s.
Moves plan_moves(const State& old, const std::vector<double>& sums, const std::vector<float>& guess,
                 int64_t n, bool sized, double total, const Settings& settings);

}  // namespace sfpk
