#include "transition_algebra.h"

#include <algorithm>
#include <cmath>

#include "codes.h"
#include "transition.h"

namespace sfpk {

namespace {

// gram() leaves blocks below the diagonal empty.
void mirror(double* matrix, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j) matrix[j * n + i] = matrix[i * n + j];
}

// Per particle, as plan_moves knows it: y_i = factor_i (m_i + alpha_i s_i + b_i (u_i - rest_i s_i)), u as
// summed.
struct Steps {
  std::vector<double> alpha, b, rest, factor;
};

double wanted_square(const Settings& settings, double total) {
  return (settings.squared ? *settings.target_density : *settings.target_density * *settings.target_density) *
         total;
}

// What the pull to the mean takes from each norm, minus one: from the Gram matrices of the reduce pass.
std::vector<double> scales_after_pull(const State& old, const std::vector<double>& sums, const Steps& steps,
                                      int64_t n, bool sized, double total, const Settings& settings) {
  const auto& [alpha, b, rest, factor] = steps;
  std::vector<double> scales(n, 0.0);
  // Gram matrix, weighted by c, of y_i = f_i (m_i + (alpha_i - b_i rest_i) s_i + b_i u_i), u as summed;
  // then the norm of (1 - η) y_i + η mean(y).
  const int64_t square = n * n;
  std::vector<double> grams(sums.begin() + kReduceSums * n, sums.end());
  double* mm = grams.data();
  double *mu = mm + square, *uu = mu + square, *sm = uu + square, *su = sm + square, *ss = su + square;
  mirror(uu, n);
  if (sized || settings.weighted) {
    mirror(mm, n);
  } else {
    // Unweighted, the inner products follow from the norms and distances of the state.
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        mm[i * n + j] =
            0.5 * (old.norms[i] * old.norms[i] + old.norms[j] * old.norms[j] - old.sq_distances[i * n + j]);
  }
  if (sized) {
    // The blocks hold m.cm, cm.u, u.cu, cm.cm, ccm.u, ccm.cm.
    mirror(sm, n);
    mirror(ss, n);
  }
  // A particle without a tangential part may be one whose gradient, and so u, is not finite.
  const auto times = [](double coefficient, double value) {
    return coefficient != 0.0 ? coefficient * value : 0.0;
  };
  std::vector<double> y(square);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const double gi = alpha[i] - b[i] * rest[i], gj = alpha[j] - b[j] * rest[j];
      const int64_t ij = i * n + j, ji = j * n + i;
      double value;
      if (sized) {
        value = mm[ij] + (gi + gj) * sm[ij] + gi * gj * ss[ij] + times(b[j], mu[ij] + gi * su[ij]) +
                times(b[i], mu[ji] + gj * su[ji]) + times(b[i] * b[j], uu[ij]);
      } else {
        value = (1 + gi) * (1 + gj) * mm[ij] + times((1 + gi) * b[j], mu[ij]) +
                times((1 + gj) * b[i], mu[ji]) + times(b[i] * b[j], uu[ij]);
      }
      y[ij] = factor[i] * factor[j] * value;
    }
  std::vector<double> with_mean(n, 0.0);
  double mean_square = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) with_mean[i] += y[i * n + j] / static_cast<double>(n);
    mean_square += with_mean[i] / static_cast<double>(n);
  }
  const double wanted = wanted_square(settings, total);
  for (int64_t i = 0; i < n; ++i) {
    const double stay = 1.0 - settings.consensus;
    const double norm_square = stay * stay * y[i * n + i] + 2 * stay * settings.consensus * with_mean[i] +
                               settings.consensus * settings.consensus * mean_square;
    const double again = std::sqrt(wanted / norm_square);
    if (std::isfinite(again)) scales[i] = again - 1.0;
  }
  return scales;
}

}  // namespace

State state_from(const std::vector<double>& sums, int64_t n, double total, bool weighted, bool squared) {
  State s;
  for (int64_t i = 0; i < n; ++i) {
    const double share = sums[n + i] / total;
    s.densities.push_back(squared ? share : std::sqrt(share));
    s.norms.push_back(std::sqrt(sums[i]));
    s.slope_norms.push_back(std::sqrt(sums[2 * n + i]));
    s.saliency_norms.push_back(weighted ? sums[3 * n + i] : 0.0);
  }
  // Inner products of the differences to particle 0.
  s.sq_distances.assign(n * n, 0.0);
  const double* gram = sums.data() + kUpdateSums * n;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j) {
      const double q = std::max(0.0, gram[i * n + i] + gram[j * n + j] - 2.0 * gram[i * n + j]);
      s.sq_distances[i * n + j] = s.sq_distances[j * n + i] = q;
    }
  return s;
}

std::vector<float> repulsion_mix(const double* saliency_norms, const double* sq_distances, int64_t n,
                                 int64_t d, double repulsion, bool weighted) {
  std::vector<float> mix(n * n, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    double row = 0.0;
    for (int64_t j = 0; j < n; ++j) {
      if (i == j) continue;  // m_i - m_i is zero
      const double h = weighted ? std::sqrt(saliency_norms[i] * saliency_norms[j]) : static_cast<double>(d);
      const double strength =
          h > 0 ? repulsion * 2.0 / h * std::exp(-sq_distances[i * n + j] / h) / static_cast<double>(n) : 0.0;
      mix[i * n + j] = static_cast<float>(-strength);
      row += strength;
    }
    mix[i * n + i] = static_cast<float>(row);
  }
  return mix;
}

std::vector<float> guess_from(const std::vector<double>& sample, int64_t n) {
  std::vector<float> guess(n);
  for (int64_t i = 0; i < n; ++i) {
    const double lean = sample[i] / sample[n + i];
    guess[i] = std::isfinite(lean) ? static_cast<float>(lean) : 0.0f;
  }
  return guess;
}

bool wants_grams(const Settings& settings, int64_t n) {
  return settings.consensus > 0.0 && n > 1 && settings.target_density.has_value();
}

Moves plan_moves(const State& old, const std::vector<double>& sums, const std::vector<float>& guess,
                 int64_t n, bool sized, double total, const Settings& settings) {
  Moves moves{std::vector<double>(kCoefficients * n, 0.0), std::vector<double>(n, 0.0), false};
  const auto row = [&](Coefficient which) { return moves.coefficients.data() + which * n; };
  // One gradient that is not finite, or too large to square, shows in a sum of its particle.
  std::vector<double> total_sums(n, 0.0);
  for (int64_t k = 0; k < kReduceSums * n; ++k) total_sums[k % n] += sums[k];
  for (int64_t i = 0; i < n; ++i) {
    const bool held = settings.only >= 0 && i != settings.only, bad = !held && !std::isfinite(total_sums[i]);
    // A row of zeros has no direction: it is held like one that is skipped.
    row(kSkipped)[i] = held || bad || !(old.slope_norms[i] > 0.0) ? 1.0 : 0.0;
    moves.cosines[i] = bad ? std::nan("") : 0.0;
    moves.stops = moves.stops || (bad && !settings.skip);
  }
  if (moves.stops) {
    std::fill(row(kSkipped), row(kSkipped) + n, 1.0);
    return moves;
  }
  // Per particle: m' = f (m + alpha s + b u), u = g - slope * s; all in fp64.
  std::vector<double> alpha(n), b(n), factor(n, 1.0), rest(n);
  for (int64_t i = 0; i < n; ++i) {
    if (row(kSkipped)[i] > 0.0) continue;
    const double ee = sums[i], es = sums[n + i], eu = sums[2 * n + i], uu = sums[3 * n + i],
                 us = sums[4 * n + i];
    const double norm = old.slope_norms[i], ss = norm * norm;
    const double scale = settings.squared ? 2.0 / total : 1.0 / (total * old.densities[i]);
    const double slope_norm = norm * scale;  // ‖∇s‖
    const double delta = us / ss;            // what the guess left over
    rest[i] = delta;
    const double u_square = std::max(0.0, uu - us * delta);
    const double slope = static_cast<double>(guess[i]) + delta;
    const double g_norm = std::sqrt(u_square + slope * slope * ss), u_norm = std::sqrt(u_square);
    alpha[i] = -settings.step / slope_norm / norm;  // ŝ = -s / ‖s‖
    const double c_mm = (settings.squared ? old.densities[i] : old.densities[i] * old.densities[i]) * total;
    double reach;        // of the tangential part, times ‖∇s‖
    if (settings.angle)  // times ‖m + alpha s‖, where m.s = c_mm
      reach = *settings.angle * slope_norm *
              std::sqrt(std::max(
                  0.0, old.norms[i] * old.norms[i] + 2 * alpha[i] * c_mm + alpha[i] * alpha[i] * ss));
    else
      reach = settings.step * std::sqrt(settings.radius * settings.radius - 1.0);
    double pace = 0.0;  // of u
    if (u_norm > kTangentTolerance * g_norm)
      pace = reach / (settings.eps > 0.0 ? std::sqrt(slope_norm * slope_norm * u_square + settings.eps)
                                         : slope_norm * u_norm);
    b[i] = pace;
    row(kSlope)[i] = slope;
    // cos(move, e): move = alpha s + b u, and u.e = eu - delta es.
    const double along = alpha[i] * es + pace * (eu - delta * es);
    const double length = std::sqrt(alpha[i] * alpha[i] * ss + pace * pace * u_square);
    if (length > 0.0 && ee > 0.0) moves.cosines[i] = along / (length * std::sqrt(ee));
    if (settings.target_density) {
      // Sum of c (m + alpha s + b u)^2, with s = c m.
      double moved;
      if (sized) {
        const double cuu = sums[5 * n + i], csu = sums[6 * n + i], css = sums[7 * n + i];
        const double uu_c = cuu - 2 * delta * csu + delta * delta * css, su_c = csu - delta * css;
        moved = c_mm + 2 * alpha[i] * ss + alpha[i] * alpha[i] * css + 2 * alpha[i] * pace * su_c +
                pace * pace * uu_c;  // c m.u = s.u = 0
      } else {
        moved = c_mm * (1 + alpha[i]) * (1 + alpha[i]) + pace * pace * u_square;
      }
      factor[i] = std::sqrt(wanted_square(settings, total) / moved);
    }
    if (!std::isfinite(factor[i])) factor[i] = 1.0;
  }
  for (int64_t i = 0; i < n; ++i) {
    const double f = factor[i];
    row(kTangential)[i] = f * b[i];
    row(kRadial)[i] = sized ? f * alpha[i] : 0.0;
    row(kKeep)[i] = sized ? f - 1.0 : f * (1.0 + alpha[i]) - 1.0;
  }
  if (wants_grams(settings, n)) {
    const auto scales = scales_after_pull(old, sums, {alpha, b, rest, factor}, n, sized, total, settings);
    std::copy(scales.begin(), scales.end(), row(kAfterPull));
  }
  return moves;
}

}  // namespace sfpk
