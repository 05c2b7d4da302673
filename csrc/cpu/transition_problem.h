// A transition's problem from tensors, and its passes over all columns.
//
// Columns are cut into chunks that depend on n and d alone, each with its own slot of fp64 sums, added in
// order: the same bits whatever the number of threads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "transition.h"
#include "transition_algebra.h"

namespace sfpk {

using OptionalTensor = std::optional<torch::stable::Tensor>;

// The vectors over coordinates, (d) fp32 each; saliency only where the kernel weighs by it.
struct Columns {
  const OptionalTensor &weights, &saliency, &sizes;
};

// The particles, (n, d), and their residual where they are bf16; neither is written unless `p.moves`.
Problem problem_of(const torch::stable::Tensor& masks, const OptionalTensor& residual,
                   const Columns& columns);

// Adds the gradients, (n, d) or with only >= 0 (1, d), and the (n, n) repulsion, null for none.
void add_gradients(Problem& p, const torch::stable::Tensor& grads, int64_t only, const float* mix);

// The coefficients of a plan as the update pass reads them.
class NarrowMoves {
 public:
  NarrowMoves(const double* coefficients, int64_t n);  // (kCoefficients, n)
  // Points the problem at them; they must outlive its passes.
  void move(Problem& p, double consensus, uint64_t key) const;

 private:
  std::vector<float> values_;
  std::vector<char> skipped_;
};

// Sums of the particles as they are, or with `p.moves` after the update pass has moved them:
// (kUpdateSums + n, n).
std::vector<double> update_sums(const Problem& p);

// c s.g and c s.s, (2, n), of a few blocks spread over the columns.
std::vector<double> sample_sums(Problem p);

// Sums of the reduce pass: (kReduceSums, n), behind them with `grams` the Gram matrices.
std::vector<double> reduce_sums(Problem p, const std::vector<float>& guess, bool grams);

torch::stable::Tensor fp64_tensor(const torch::stable::Tensor& like, const std::vector<double>& values,
                                  std::vector<int64_t> shape);

// fp64 numbers of a contiguous tensor of `size` entries.
std::vector<double> read_fp64(const torch::stable::Tensor& t, int64_t size, const char* argument);

// TransitionStats without its cosines, for n particles.
State read_state(const std::vector<torch::stable::Tensor>& state, int64_t n);

}  // namespace sfpk
