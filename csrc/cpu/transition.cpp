// transition_: the fused SFPK transition on the CPU. One reduce pass (reads M and G), the n x n algebra in
// fp64, one update pass (reads M and G, writes M), which also measures the moved particles for the next call.
//
// Columns are cut into chunks that depend on n and d alone, each with its own slot of fp64 sums, added in
// order: the same bits whatever the number of threads.
#include "transition.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"

namespace {

using sfpk::GradKind;
using sfpk::Pass;
using sfpk::Problem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kTangentTolerance = 1e-6;   // as in ops/transition/reference.py
constexpr int64_t kScratchFloats = 1 << 15;  // of one row block: stays in L2 with its two companions
constexpr int64_t kMaxChunks = 512;
constexpr int64_t kGuessBlocks = 16;
constexpr int64_t kGuessColumns = 256;

// The widest variant this CPU runs; SFPK_CPU_ISA=baseline|avx2 asks for a narrower one (tests).
sfpk::RunChunk choose_run_chunk() {
#if defined(__x86_64__)
  const char* asked = std::getenv("SFPK_CPU_ISA");
  const std::string isa = asked ? asked : "avx512";
  STD_TORCH_CHECK(isa == "baseline" || isa == "avx2" || isa == "avx512",
                  "transition_: SFPK_CPU_ISA: wanted baseline, avx2 or avx512, got ", isa);
  if (isa == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return sfpk::avx512::run_chunk;
  if (isa != "baseline" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return sfpk::avx2::run_chunk;
#endif
  return sfpk::baseline::run_chunk;
}

sfpk::RunChunk run_chunk_for_this_cpu() {
  static const sfpk::RunChunk chosen = choose_run_chunk();
  return chosen;
}

struct FreeDeleter {
  void operator()(float* memory) const { std::free(memory); }
};

// 64-byte aligned scratch, zeroed, so that padding never holds NaN.
std::unique_ptr<float, FreeDeleter> scratch(const Problem& p) {
  const int64_t floats = (3 * p.n + 4) * (p.tile + sfpk::kRowPadding);
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  STD_TORCH_CHECK(memory != nullptr, "transition_: out of memory: ", bytes, " bytes of scratch");
  std::memset(memory, 0, bytes);
  return std::unique_ptr<float, FreeDeleter>(memory);
}

// One pass over all columns; returns `size` sums.
std::vector<double> run_pass(const Problem& p, Pass pass, int64_t size) {
  const int64_t columns = p.d;
  const int64_t tiles = (columns + p.tile - 1) / p.tile;
  const int64_t tiles_per_chunk = std::max<int64_t>(1, (tiles + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunk = tiles_per_chunk * p.tile;
  const int64_t chunks = (columns + chunk - 1) / chunk;
  std::vector<double> slots(static_cast<size_t>(chunks * size), 0.0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const auto memory = scratch(p);
    for (int64_t k = begin; k < end; ++k)
      run_chunk_for_this_cpu()(p, pass, k * chunk, std::min(columns, (k + 1) * chunk), memory.get(),
                               slots.data() + k * size);
  });
  std::vector<double> sums(slots.begin(), slots.begin() + size);
  for (int64_t k = 1; k < chunks; ++k)
    for (int64_t s = 0; s < size; ++s) sums[s] += slots[k * size + s];
  return sums;
}

// The reduce sums of a few blocks spread over the columns.
std::vector<double> sample_sums(const Problem& p, int64_t size) {
  std::vector<double> sums(size, 0.0);
  const auto memory = scratch(p);
  const int64_t blocks = std::min<int64_t>(kGuessBlocks, (p.d + p.tile - 1) / p.tile);
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t begin = p.d / blocks * k;
    run_chunk_for_this_cpu()(p, Pass::kReduce, begin, std::min(p.d, begin + kGuessColumns), memory.get(),
                             sums.data());
  }
  return sums;
}

// gram() leaves blocks below the diagonal empty.
void mirror(double* matrix, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j) matrix[j * n + i] = matrix[i * n + j];
}

// The statistics of the particles, as the Python side knows them (TransitionStats without the cosines).
struct State {
  std::vector<double> densities, norms, slope_norms, saliency_norms, sq_distances;
};

State state_from(const std::vector<double>& sums, const Problem& p, double total, bool squared) {
  const int64_t n = p.n;
  State s;
  for (int64_t i = 0; i < n; ++i) {
    const double mm = sums[i], cmm = p.sizes ? sums[n + i] : mm, ccmm = p.sizes ? sums[2 * n + i] : mm;
    const double share = cmm / total;
    s.densities.push_back(squared ? share : std::sqrt(share));
    s.norms.push_back(std::sqrt(mm));
    s.slope_norms.push_back(std::sqrt(ccmm));
    s.saliency_norms.push_back(p.weighted ? sums[3 * n + i] : 0.0);
  }
  // Inner products of the differences to particle 0.
  s.sq_distances.assign(n * n, 0.0);
  const double* gram = sums.data() + sfpk::kUpdateSums * n;
  const auto inner = [&](int64_t i, int64_t j) { return i > 0 ? gram[(i - 1) * (n - 1) + j - 1] : 0.0; };
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j) {
      const double q = std::max(0.0, inner(i, i) + inner(j, j) - 2.0 * inner(i, j));
      s.sq_distances[i * n + j] = s.sq_distances[j * n + i] = q;
    }
  return s;
}

std::vector<double> read(const Tensor& t, int64_t size) {
  SFPK_CHECK(t.numel() == size && t.is_contiguous() && t.scalar_type() == ScalarType::Double, "transition_",
             "state", "contiguous fp64 statistics of the same particles", "others");
  const auto* data = static_cast<const double*>(t.const_data_ptr());
  return {data, data + size};
}

const float* vector_data(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

Tensor fp64_tensor(const Tensor& like, const std::vector<double>& values, std::vector<int64_t> shape) {
  Tensor t = torch::stable::new_empty(like, shape, ScalarType::Double);
  std::copy(values.begin(), values.end(), static_cast<double*>(t.mutable_data_ptr()));
  return t;
}

// lambda (2 / (n h_ij)) kappa_ij as a Laplacian over centred particles.
std::vector<float> repulsion_mix(const State& s, int64_t n, int64_t d, double repulsion, bool weighted) {
  std::vector<float> mix(n * n, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    double row = 0.0;
    for (int64_t j = 0; j < n; ++j) {
      if (i == j) continue;  // m_i - m_i is zero
      const double h =
          weighted ? std::sqrt(s.saliency_norms[i] * s.saliency_norms[j]) : static_cast<double>(d);
      const double strength =
          h > 0 ? repulsion * 2.0 / h * std::exp(-s.sq_distances[i * n + j] / h) / static_cast<double>(n)
                : 0.0;
      mix[i * n + j] = static_cast<float>(-strength);
      row += strength;
    }
    mix[i * n + i] = static_cast<float>(row);
  }
  return mix;
}

using Result = std::tuple<bool, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Returns (moved, TransitionStats...). With a non-finite gradient nothing is moved, and the cosines of the
// particles it came from are NaN.
Result transition_(Tensor masks, const Tensor& grads, const std::optional<Tensor>& weights,
                   const std::optional<Tensor>& saliency, const std::optional<Tensor>& sizes,
                   const std::vector<Tensor>& state, double step, double radius, double repulsion,
                   bool weighted, bool squared, std::optional<double> target_density, double consensus,
                   double eps) {
  const int64_t n = masks.size(0), d = masks.size(1);
  SFPK_CHECK(masks.scalar_type() == ScalarType::Float && (d == 1 || masks.stride(1) == 1), "transition_",
             "masks", "fp32 rows without gaps", "others");
  SFPK_CHECK(grads.dim() == 2 && grads.size(0) == n && grads.size(1) == d, "transition_", "grads",
             "the shape of masks", "another shape");
  SFPK_CHECK(d == 1 || grads.stride(1) == 1, "transition_", "grads", "rows without gaps", "others");
  SFPK_CHECK(grads.scalar_type() == ScalarType::Float || grads.scalar_type() == ScalarType::BFloat16 ||
                 grads.scalar_type() == ScalarType::Half,
             "transition_", "grads", "fp32, bf16 or fp16", "another dtype");
  for (const auto* t : {&weights, &saliency, &sizes})
    SFPK_CHECK(
        !*t || ((*t)->scalar_type() == ScalarType::Float && (*t)->is_contiguous() && (*t)->numel() == d),
        "transition_", "weights, saliency, sizes", "contiguous fp32 vectors of d entries", "others");

  Problem p{};
  p.n = n;
  p.d = d;
  // Tiles depend on n alone; at least two vectors, at most what fp32 lanes may sum.
  p.tile = std::clamp<int64_t>(kScratchFloats / n / 64 * 64, 64, 1024);
  p.masks = static_cast<float*>(masks.mutable_data_ptr());
  p.mask_stride = masks.stride(0);
  p.grads = grads.const_data_ptr();
  p.grad_stride = grads.stride(0);
  p.grad_kind = grads.scalar_type() == ScalarType::Float      ? GradKind::kFloat
                : grads.scalar_type() == ScalarType::BFloat16 ? GradKind::kBFloat16
                                                              : GradKind::kHalf;
  p.weights = vector_data(weights);
  p.saliency = weighted ? vector_data(saliency) : nullptr;
  p.sizes = vector_data(sizes);
  p.weighted = weighted;

  double total = static_cast<double>(d);
  if (p.sizes) {
    total = 0.0;
    for (int64_t e = 0; e < d; ++e) total += static_cast<double>(p.sizes[e]);
  }

  State old;
  if (state.empty()) {
    old = state_from(run_pass(p, Pass::kUpdate, sfpk::kUpdateSums * n + n * n), p, total, squared);
  } else {
    old = {read(state[0], n), read(state[1], n), read(state[2], n), read(state[3], n), read(state[4], n * n)};
  }

  std::vector<float> mix, zeros(n, 0.0f);
  p.repel = repulsion > 0.0 && n > 1;
  if (p.repel) {
    mix = repulsion_mix(old, n, d, repulsion, weighted);
    p.mix = mix.data();
  }

  // A sample tells how far g leans on the slope s = c*m; summing u = g - guess*s instead of g keeps the
  // digits of the norm of u when g is nearly parallel to s.
  const int64_t size = sfpk::kReduceSums * n;
  std::vector<float> guess(n, 0.0f);
  p.guess = zeros.data();
  const auto sample = sample_sums(p, size);
  for (int64_t i = 0; i < n; ++i) {
    const double lean = sample[6 * n + i] / sample[7 * n + i];
    guess[i] = std::isfinite(lean) ? static_cast<float>(lean) : 0.0f;
  }
  p.guess = guess.data();
  p.grams = consensus > 0.0 && n > 1 && target_density.has_value();
  const auto sums = run_pass(p, Pass::kReduce, size + (p.grams ? sfpk::kGrams * n * n : 0));

  std::vector<double> cosines(n, 0.0);
  bool finite = true;
  for (int64_t i = 0; i < n; ++i)
    if (!std::isfinite(sums[i])) {
      finite = false;
      cosines[i] = std::nan("");
    }
  const auto pack = [&](bool moved, const State& s) {
    return Result{moved,
                  fp64_tensor(masks, s.densities, {n}),
                  fp64_tensor(masks, s.norms, {n}),
                  fp64_tensor(masks, s.slope_norms, {n}),
                  fp64_tensor(masks, s.saliency_norms, {n}),
                  fp64_tensor(masks, s.sq_distances, {n, n}),
                  fp64_tensor(masks, cosines, {n})};
  };
  if (!finite) return pack(false, old);

  // Per particle: m' = f (m + alpha s + b u), u = g - slope * s; all in fp64.
  std::vector<double> alpha(n), b(n), factor(n, 1.0), rest(n);
  std::vector<float> high(n), low(n), keep(n), radial(n), tangential(n), after_pull(n, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    const double ee = sums[i], es = sums[n + i], eu = sums[2 * n + i], uu = sums[3 * n + i],
                 us = sums[4 * n + i];
    const double norm = old.slope_norms[i], ss = norm * norm;
    if (!(norm > 0.0)) continue;  // a row of zeros stays
    const double scale = squared ? 2.0 / total : 1.0 / (total * old.densities[i]);
    const double slope_norm = norm * scale;  // ‖∇s‖
    const double delta = us / ss;            // what the guess left over
    rest[i] = delta;
    const double u_square = std::max(0.0, uu - us * delta);
    const double slope = static_cast<double>(guess[i]) + delta;
    const double g_norm = std::sqrt(u_square + slope * slope * ss), u_norm = std::sqrt(u_square);
    const double root = std::sqrt(radius * radius - 1.0);
    double pace = 0.0;  // of u
    if (eps > 0.0)
      pace = step * root / std::sqrt(slope_norm * slope_norm * u_square + eps);
    else if (u_norm > kTangentTolerance * g_norm)
      pace = step * root / (slope_norm * u_norm);
    alpha[i] = -step / slope_norm / norm;  // ŝ = -s / ‖s‖
    b[i] = pace;
    high[i] = static_cast<float>(slope);
    low[i] = static_cast<float>(slope - static_cast<double>(high[i]));
    // cos(move, e): move = alpha s + b u, and u.e = eu - delta es.
    const double along = alpha[i] * es + pace * (eu - delta * es);
    const double length = std::sqrt(alpha[i] * alpha[i] * ss + pace * pace * u_square);
    if (length > 0.0 && ee > 0.0) cosines[i] = along / (length * std::sqrt(ee));
    if (target_density) {
      // Sum of c (m + alpha s + b u)^2, with s = c m.
      double moved;
      const double c_mm = (squared ? old.densities[i] : old.densities[i] * old.densities[i]) * total;
      if (p.sizes) {
        const double cuu = sums[5 * n + i], csu = sums[6 * n + i], css = sums[7 * n + i];
        const double uu_c = cuu - 2 * delta * csu + delta * delta * css, su_c = csu - delta * css;
        moved = c_mm + 2 * alpha[i] * ss + alpha[i] * alpha[i] * css + 2 * alpha[i] * pace * su_c +
                pace * pace * uu_c;  // c m.u = s.u = 0
      } else {
        moved = c_mm * (1 + alpha[i]) * (1 + alpha[i]) + pace * pace * u_square;
      }
      const double wanted = (squared ? *target_density : *target_density * *target_density) * total;
      factor[i] = std::sqrt(wanted / moved);
    }
    if (!std::isfinite(factor[i])) factor[i] = 1.0;
  }
  for (int64_t i = 0; i < n; ++i) {
    const double f = factor[i];
    tangential[i] = static_cast<float>(f * b[i]);
    if (p.sizes) {
      keep[i] = static_cast<float>(f - 1.0);
      radial[i] = static_cast<float>(f * alpha[i]);
    } else {
      keep[i] = static_cast<float>(f * (1.0 + alpha[i]) - 1.0);
    }
  }
  if (p.grams) {
    // Gram matrix, weighted by c, of y_i = f_i (m_i + (alpha_i - b_i rest_i) s_i + b_i u_i), u as summed;
    // then the norm of (1 - η) y_i + η mean(y).
    const int64_t square = n * n;
    std::vector<double> grams(sums.begin() + size, sums.end());
    double* mm = grams.data();
    double *mu = mm + square, *uu = mu + square, *sm = uu + square, *su = sm + square, *ss = su + square;
    mirror(uu, n);
    if (p.sizes || weighted) {
      mirror(mm, n);
    } else {
      // Unweighted, the inner products follow from the norms and distances of the state.
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j)
          mm[i * n + j] =
              0.5 * (old.norms[i] * old.norms[i] + old.norms[j] * old.norms[j] - old.sq_distances[i * n + j]);
    }
    if (p.sizes) {
      // In this branch the blocks hold m.cm, cm.u, u.cu, cm.cm, ccm.u, ccm.cm.
      mirror(sm, n);
      mirror(ss, n);
    }
    std::vector<double> y(square);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const double gi = alpha[i] - b[i] * rest[i], gj = alpha[j] - b[j] * rest[j];
        const int64_t ij = i * n + j, ji = j * n + i;
        double value;
        if (p.sizes) {
          value = mm[ij] + (gi + gj) * sm[ij] + gi * gj * ss[ij] + b[j] * (mu[ij] + gi * su[ij]) +
                  b[i] * (mu[ji] + gj * su[ji]) + b[i] * b[j] * uu[ij];
        } else {
          value = (1 + gi) * (1 + gj) * mm[ij] + (1 + gi) * b[j] * mu[ij] + (1 + gj) * b[i] * mu[ji] +
                  b[i] * b[j] * uu[ij];
        }
        y[ij] = factor[i] * factor[j] * value;
      }
    std::vector<double> with_mean(n, 0.0);
    double mean_square = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) with_mean[i] += y[i * n + j] / static_cast<double>(n);
      mean_square += with_mean[i] / static_cast<double>(n);
    }
    const double wanted = (squared ? *target_density : *target_density * *target_density) * total;
    for (int64_t i = 0; i < n; ++i) {
      const double stay = 1.0 - consensus;
      const double norm_square = stay * stay * y[i * n + i] + 2 * stay * consensus * with_mean[i] +
                                 consensus * consensus * mean_square;
      const double again = std::sqrt(wanted / norm_square);
      if (std::isfinite(again)) after_pull[i] = static_cast<float>(again - 1.0);
    }
  }
  p.slope_high = high.data();
  p.slope_low = low.data();
  p.keep = keep.data();
  p.radial = radial.data();
  p.tangential = tangential.data();
  p.after_pull = after_pull.data();
  p.pull = n > 1 ? static_cast<float>(consensus) : 0.0f;
  p.moves = true;
  const auto moved = run_pass(p, Pass::kUpdate, sfpk::kUpdateSums * n + n * n);
  return pack(true, state_from(moved, p, total, squared));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CPU, m) { m.impl("transition_", TORCH_BOX(&transition_)); }
