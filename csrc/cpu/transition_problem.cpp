#include "transition_problem.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "checks.h"
#include "integers.h"
#include "isa.h"
#include "received.h"

namespace sfpk {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kScratchFloats = 1 << 15;  // of one row block: stays in L2 with its two companions
constexpr int64_t kMaxChunks = 512;
constexpr int64_t kSlotSums = 1 << 23;  // fp64 sums in all slots together
constexpr int64_t kGuessBlocks = 16;
constexpr int64_t kGuessColumns = 256;

RunChunk run_chunk_for_this_cpu() {
  switch (cpu_isa()) {
    case Isa::kAvx512:
      return avx512::run_chunk;
    case Isa::kAvx2:
      return avx2::run_chunk;
    default:
      return baseline::run_chunk;
  }
}

struct FreeDeleter {
  void operator()(float* memory) const { std::free(memory); }
};

// 64-byte aligned scratch, zeroed, so that padding never holds NaN.
std::unique_ptr<float, FreeDeleter> scratch(const Problem& p) {
  const int64_t floats = (3 * p.n + 4) * (p.tile + kRowPadding);
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  STD_TORCH_CHECK(memory != nullptr, "transition_: out of memory: ", bytes, " bytes of scratch");
  std::memset(memory, 0, bytes);
  return std::unique_ptr<float, FreeDeleter>(memory);
}

// One pass over all columns; returns `size` sums.
std::vector<double> run_pass(const Problem& p, Pass pass, int64_t size) {
  const int64_t columns = p.d;
  if (columns == 0) return std::vector<double>(size, 0.0);
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

const float* vector_data(const OptionalTensor& t, int64_t d, const char* argument) {
  if (!t) return nullptr;
  SFPK_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == d, "transition_",
             argument, "a contiguous fp32 vector of d entries", "another");
  return static_cast<const float*>(t->const_data_ptr());
}

FloatKind kind_of_rows(const Tensor& t, const char* argument) {
  const FloatKind kind = kind_of(t, "transition_", argument);
  SFPK_CHECK(t.size(1) <= 1 || t.stride(1) == 1, "transition_", argument, "rows without gaps", "others");
  return kind;
}

}  // namespace

Problem problem_of(const Tensor& masks, const OptionalTensor& residual, const Columns& columns) {
  SFPK_CHECK(masks.dim() == 2 && masks.size(0) > 0, "transition_", "masks", "shape (n >= 1, d)", masks.dim(),
             " dimensions");
  Problem p{};
  p.n = masks.size(0);
  p.d = masks.size(1);
  p.only = -1;
  SFPK_CHECK(!residual || (residual->dim() == 2 && residual->size(0) == p.n && residual->size(1) == p.d),
             "transition_", "residual", "the shape of masks", "another shape");
  // Tiles depend on n alone; at least two vectors, at most what fp32 lanes may sum.
  p.tile = std::clamp<int64_t>(kScratchFloats / p.n / 64 * 64, 64, 1024);
  p.mask_kind = kind_of_rows(masks, "masks");
  p.masks = const_cast<void*>(masks.const_data_ptr());
  p.mask_stride = masks.stride(0);
  SFPK_CHECK((p.mask_kind == FloatKind::kBFloat16) == residual.has_value() &&
                 (!residual || kind_of_rows(*residual, "residual") == FloatKind::kBFloat16),
             "transition_", "residual", "a bf16 tensor with bf16 masks, else none", "something else");
  if (residual) {
    p.residual = const_cast<uint16_t*>(static_cast<const uint16_t*>(residual->const_data_ptr()));
    p.residual_stride = residual->stride(0);
  }
  p.weights = vector_data(columns.weights, p.d, "weights");
  p.saliency = vector_data(columns.saliency, p.d, "saliency");
  p.sizes = vector_data(columns.sizes, p.d, "sizes");
  return p;
}

void add_gradients(Problem& p, const Tensor& grads, int64_t only, const float* mix) {
  SFPK_CHECK(only < p.n, "transition_", "only", "a particle", only);
  SFPK_CHECK(grads.dim() == 2 && grads.size(0) == (only < 0 ? p.n : 1) && grads.size(1) == p.d, "transition_",
             "grads", "a row per particle that may move", "another shape");
  p.grads = grads.const_data_ptr();
  p.grad_stride = only < 0 ? grads.stride(0) : 0;
  p.grad_kind = kind_of_rows(grads, "grads");
  p.only = only;
  p.repel = mix != nullptr;
  p.mix = mix;
}

NarrowMoves::NarrowMoves(const double* coefficients, int64_t n) : skipped_(n) {
  const auto add = [&](auto&& value) {
    for (int64_t i = 0; i < n; ++i) values_.push_back(static_cast<float>(value(i)));
  };
  const auto row = [&](Coefficient which) { return coefficients + which * n; };
  values_.reserve(6 * n);
  const double* slope = row(kSlope);
  add([&](int64_t i) { return slope[i]; });
  add([&](int64_t i) { return slope[i] - static_cast<double>(static_cast<float>(slope[i])); });
  for (const auto which : {kKeep, kRadial, kTangential, kAfterPull})
    add([&](int64_t i) { return row(which)[i]; });
  for (int64_t i = 0; i < n; ++i) skipped_[i] = row(kSkipped)[i] > 0.0;
}

void NarrowMoves::move(Problem& p, double consensus, uint64_t key) const {
  const float* next = values_.data();
  for (const float** at : {&p.slope_high, &p.slope_low, &p.keep, &p.radial, &p.tangential, &p.after_pull}) {
    *at = next;
    next += p.n;
  }
  p.skipped = skipped_.data();
  p.pull = p.n > 1 ? static_cast<float>(consensus) : 0.0f;
  p.key = key;
  p.moves = true;
}

std::vector<double> update_sums(const Problem& p) {
  const int64_t n = p.n;
  std::vector<double> sums = run_pass(p, Pass::kUpdate, kUpdateSums * n + n * n);
  // Without sizes the kernel sums m.m alone: its two weighted companions are the same.
  for (int64_t k = n; k < 3 * n && !p.sizes; ++k) sums[k] = sums[k - n];
  // It leaves out particle 0, from which the differences are taken: its row and column are zeros.
  double* gram = sums.data() + kUpdateSums * n;
  for (int64_t i = n - 1; i > 0; --i)
    for (int64_t j = n - 1; j >= 0; --j) gram[i * n + j] = j > 0 ? gram[(i - 1) * (n - 1) + j - 1] : 0.0;
  std::fill(gram, gram + n, 0.0);
  return sums;
}

std::vector<double> sample_sums(Problem p) {
  const std::vector<float> zeros(p.n, 0.0f);
  p.guess = zeros.data();
  std::vector<double> sums(kReduceSums * p.n, 0.0);
  const auto memory = scratch(p);
  const int64_t blocks = std::min<int64_t>(kGuessBlocks, ceil_div(p.d, p.tile));
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t begin = p.d / blocks * k;
    run_chunk_for_this_cpu()(p, Pass::kReduce, begin, std::min(p.d, begin + kGuessColumns), memory.get(),
                             sums.data());
  }
  return {sums.begin() + 6 * p.n, sums.end()};
}

std::vector<double> reduce_sums(Problem p, const std::vector<float>& guess, bool grams) {
  p.guess = guess.data();
  p.grams = grams;
  return run_pass(p, Pass::kReduce, kReduceSums * p.n + (grams ? kGrams * p.n * p.n : 0));
}

Tensor fp64_tensor(const Tensor& like, const std::vector<double>& values, std::vector<int64_t> shape) {
  Tensor t = torch::stable::new_empty(like, shape, ScalarType::Double);
  std::copy(values.begin(), values.end(), static_cast<double*>(t.mutable_data_ptr()));
  return t;
}

std::vector<double> read_fp64(const Tensor& t, int64_t size, const char* argument) {
  SFPK_CHECK(t.numel() == size && t.is_contiguous() && t.scalar_type() == ScalarType::Double, "transition_",
             argument, "contiguous fp64 numbers of the same particles", "others");
  const auto* data = static_cast<const double*>(t.const_data_ptr());
  return {data, data + size};
}

State read_state(const std::vector<Tensor>& state, int64_t n) {
  SFPK_CHECK(state.size() >= 5, "transition_", "state", "TransitionStats", state.size(), " tensors");
  const auto read = [&](int which, int64_t size) { return read_fp64(state[which], size, "state"); };
  return {read(0, n), read(1, n), read(2, n), read(3, n), read(4, n * n)};
}

}  // namespace sfpk
