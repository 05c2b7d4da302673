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
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "integers.h"
#include "isa.h"
#include "received.h"
#include "transition_algebra.h"

namespace {

using sfpk::ceil_div;
using sfpk::FloatKind;
using sfpk::Pass;
using sfpk::Problem;
using sfpk::State;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kScratchFloats = 1 << 15;  // of one row block: stays in L2 with its two companions
constexpr int64_t kMaxChunks = 512;
constexpr int64_t kSlotSums = 1 << 23;  // fp64 sums in all slots together
constexpr int64_t kGuessBlocks = 16;
constexpr int64_t kGuessColumns = 256;

sfpk::RunChunk run_chunk_for_this_cpu() {
  switch (sfpk::cpu_isa()) {
    case sfpk::Isa::kAvx512:
      return sfpk::avx512::run_chunk;
    case sfpk::Isa::kAvx2:
      return sfpk::avx2::run_chunk;
    default:
      return sfpk::baseline::run_chunk;
  }
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
  const int64_t tiles = ceil_div(columns, p.tile);
  const int64_t most = std::clamp<int64_t>(kSlotSums / size, 16, kMaxChunks);
  const int64_t tiles_per_chunk = std::max<int64_t>(1, ceil_div(tiles, most));
  const int64_t chunk = tiles_per_chunk * p.tile;
  const int64_t chunks = ceil_div(columns, chunk);
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
  const int64_t blocks = std::min<int64_t>(kGuessBlocks, ceil_div(p.d, p.tile));
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t begin = p.d / blocks * k;
    run_chunk_for_this_cpu()(p, Pass::kReduce, begin, std::min(p.d, begin + kGuessColumns), memory.get(),
                             sums.data());
  }
  return sums;
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

FloatKind kind_of_rows(const Tensor& t, const char* argument) {
  const FloatKind kind = sfpk::kind_of(t, "transition_", argument);
  SFPK_CHECK(t.size(1) == 1 || t.stride(1) == 1, "transition_", argument, "rows without gaps", "others");
  return kind;
}

Tensor fp64_tensor(const Tensor& like, const std::vector<double>& values, std::vector<int64_t> shape) {
  Tensor t = torch::stable::new_empty(like, shape, ScalarType::Double);
  std::copy(values.begin(), values.end(), static_cast<double*>(t.mutable_data_ptr()));
  return t;
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Returns TransitionStats. The cosine of a particle whose gradient is not finite is NaN; it has not moved,
// and unless `skip` neither has any other.
Result transition_(Tensor masks, const Tensor& grads, const std::optional<Tensor>& weights,
                   const std::optional<Tensor>& saliency, const std::optional<Tensor>& sizes,
                   std::optional<Tensor> residual, const std::vector<Tensor>& state, double step,
                   double radius, double repulsion, bool weighted, bool squared,
                   std::optional<double> target_density, double consensus, double eps, int64_t key, bool skip,
                   int64_t only) {
  SFPK_CHECK(masks.dim() == 2 && masks.size(0) > 0 && masks.size(1) > 0, "transition_", "masks",
             "shape (n >= 1, d >= 1)", masks.dim(), " dimensions");
  SFPK_CHECK(state.empty() || state.size() >= 5, "transition_", "state", "TransitionStats or nothing",
             state.size(), " tensors");
  const int64_t n = masks.size(0), d = masks.size(1);
  SFPK_CHECK(only < n, "transition_", "only", "a particle", only);
  SFPK_CHECK(grads.dim() == 2 && grads.size(0) == (only < 0 ? n : 1) && grads.size(1) == d, "transition_",
             "grads", "a row per particle that may move", "another shape");
  SFPK_CHECK(!residual || (residual->dim() == 2 && residual->size(0) == n && residual->size(1) == d),
             "transition_", "residual", "the shape of masks", "another shape");
  for (const auto* t : {&weights, &saliency, &sizes})
    SFPK_CHECK(
        !*t || ((*t)->scalar_type() == ScalarType::Float && (*t)->is_contiguous() && (*t)->numel() == d),
        "transition_", "weights, saliency, sizes", "contiguous fp32 vectors of d entries", "others");

  Problem p{};
  p.n = n;
  p.d = d;
  // Tiles depend on n alone; at least two vectors, at most what fp32 lanes may sum.
  p.tile = std::clamp<int64_t>(kScratchFloats / n / 64 * 64, 64, 1024);
  p.mask_kind = kind_of_rows(masks, "masks");
  p.masks = masks.mutable_data_ptr();
  p.mask_stride = masks.stride(0);
  p.key = static_cast<uint64_t>(key);
  SFPK_CHECK((p.mask_kind == FloatKind::kBFloat16) == residual.has_value() &&
                 (!residual || kind_of_rows(*residual, "residual") == FloatKind::kBFloat16),
             "transition_", "residual", "a bf16 tensor with bf16 masks, else none", "something else");
  if (residual) {
    p.residual = static_cast<uint16_t*>(residual->mutable_data_ptr());
    p.residual_stride = residual->stride(0);
  }
  p.grads = grads.const_data_ptr();
  p.grad_stride = only < 0 ? grads.stride(0) : 0;
  p.grad_kind = kind_of_rows(grads, "grads");
  p.weights = vector_data(weights);
  p.saliency = weighted ? vector_data(saliency) : nullptr;
  p.sizes = vector_data(sizes);
  p.weighted = weighted;
  p.only = only;

  double total = static_cast<double>(d);
  if (p.sizes) {
    total = 0.0;
    for (int64_t e = 0; e < d; ++e) total += static_cast<double>(p.sizes[e]);
  }

  const sfpk::Settings settings{step, radius, repulsion, weighted, squared, target_density, consensus, eps};
  const auto measured = [&](const std::vector<double>& sums) {
    return sfpk::state_from(sums, n, p.sizes != nullptr, total, settings);
  };
  State old;
  if (state.empty()) {
    old = measured(run_pass(p, Pass::kUpdate, sfpk::kUpdateSums * n + n * n));
  } else {
    old = {read(state[0], n), read(state[1], n), read(state[2], n), read(state[3], n), read(state[4], n * n)};
  }

  std::vector<float> mix, zeros(n, 0.0f);
  p.repel = repulsion > 0.0 && n > 1;
  if (p.repel) {
    mix = sfpk::repulsion_mix(old, n, d, settings);
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

  const auto pack = [&](const std::vector<double>& cosines, const State& s) {
    return Result{fp64_tensor(masks, s.densities, {n}),       fp64_tensor(masks, s.norms, {n}),
                  fp64_tensor(masks, s.slope_norms, {n}),     fp64_tensor(masks, s.saliency_norms, {n}),
                  fp64_tensor(masks, s.sq_distances, {n, n}), fp64_tensor(masks, cosines, {n})};
  };
  // One gradient that is not finite, or too large to square, shows in a sum of its particle.
  std::vector<double> total_sums(n, 0.0);
  for (int64_t k = 0; k < size; ++k) total_sums[k % n] += sums[k];
  std::vector<char> skipped(n);
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) {
    const bool held = only >= 0 && i != only;
    bad = bad || (!held && !std::isfinite(total_sums[i]));
    skipped[i] = held || !std::isfinite(total_sums[i]);
  }
  const auto without_held = [&](std::vector<double> cosines) {
    for (int64_t i = 0; only >= 0 && i < n; ++i)
      if (i != only) cosines[i] = 0.0;
    return cosines;
  };
  if (!skip && bad) {
    std::vector<double> cosines(n, 0.0);
    for (int64_t i = 0; i < n; ++i)
      if (skipped[i]) cosines[i] = std::nan("");
    return pack(without_held(cosines), old);
  }

  const auto moves =
      sfpk::plan_moves(old, sums, guess, skipped, n, p.sizes != nullptr, p.grams, total, settings);
  // A row of zeros has no direction: it is held like one that is skipped.
  for (int64_t i = 0; i < n; ++i) skipped[i] = skipped[i] || !(old.slope_norms[i] > 0.0);
  p.skipped = skipped.data();
  p.slope_high = moves.slope_high.data();
  p.slope_low = moves.slope_low.data();
  p.keep = moves.keep.data();
  p.radial = moves.radial.data();
  p.tangential = moves.tangential.data();
  p.after_pull = moves.after_pull.data();
  p.pull = n > 1 ? static_cast<float>(consensus) : 0.0f;
  p.moves = true;
  const auto moved = run_pass(p, Pass::kUpdate, sfpk::kUpdateSums * n + n * n);
  return pack(without_held(moves.cosines), measured(moved));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CPU, m) { m.impl("transition_", TORCH_BOX(&transition_)); }
