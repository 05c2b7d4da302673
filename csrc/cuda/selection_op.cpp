// topk_device_: exact selection on the GPU. Buffers come from the caller, so that nothing is allocated and
// nothing waited for: the op can be captured in a graph.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "arguments.h"
#include "integers.h"
#include "selection.h"
#include "stream.h"

namespace {

using namespace sfpk;
using namespace sfpk::cuda;

void topk_device_(const std::vector<Tensor>& values,  // one (n, d), or the tensors of a list as (1, numel)
                  int64_t score, const std::vector<Tensor>& saliency,
                  const std::vector<Tensor>& excluded,  // bools (rankings, count) each
                  const std::vector<Tensor>& always,    // likewise
                  const Tensor& k, const Tensor& candidates, const std::optional<Tensor>& guess, int64_t unit,
                  std::vector<Tensor> masks,  // bool, uint8 or int32 (rankings, units) each
                  Tensor threshold, Tensor tie_end, Tensor state, Tensor bins, Tensor ties) {
  const char* op = "topk_device_";
  SFPK_CHECK(!values.empty(), op, "values", "at least one tensor", "none");
  const Score kind = score_of(score, op);
  SFPK_CHECK(unit == 0 || unit == 1 || unit == 8 || unit == 32, op, "unit", "0, 1, 8 or 32", unit);
  const Tensor& first = values[0];
  const bool mean = kind == Score::kMeanAbsSaliency;
  const int64_t rankings = mean ? 1 : first.size(0);
  std::vector<Source> sources;
  int64_t flat = 0, chunks = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t rows = first.size(0), count = values[i].size(1);
    check_rows(values[i], first, rows, count, op, "values");
    Source s{};
    s.values = values[i].data_ptr();
    s.kind = kind_of(values[i], op, "values");
    s.score = kind;
    s.rows = mean ? rows : 1;
    s.row_stride = values[i].stride(0);
    s.count = count;
    s.first = flat;
    s.scale = 1.0f / static_cast<float>(rows);
    if (needs_saliency(kind)) {
      SFPK_CHECK(saliency.size() == values.size(), op, "saliency", "one per tensor of values",
                 saliency.size());
      s.saliency = data_of<float>(saliency[i], first, ScalarType::Float, count, op, "saliency");
    }
    const auto bools = [&](const std::vector<Tensor>& tensors, const char* name,
                           int64_t& stride) -> const uint8_t* {
      if (tensors.empty()) return nullptr;
      SFPK_CHECK(tensors.size() == values.size() && tensors[i].scalar_type() == ScalarType::Bool, op, name,
                 "bools, one per tensor of values", "others");
      check_rows(tensors[i], first, rankings, count, op, name);
      stride = tensors[i].stride(0);
      return static_cast<const uint8_t*>(tensors[i].data_ptr());
    };
    s.excluded = bools(excluded, "excluded", s.row_excluded);
    s.always = bools(always, "always", s.row_always);
    sources.push_back(s);
    flat += count;
    chunks += ceil_div(count, kChunk);
  }
  const Workspace workspace{
      data_of<int64_t>(state, first, ScalarType::Long, rankings * kStateColumns, op, "state"),
      reinterpret_cast<unsigned long long*>(
          data_of<int64_t>(bins, first, ScalarType::Long, rankings * kCounters, op, "bins")),
      data_of<int64_t>(ties, first, ScalarType::Long, rankings * chunks, op, "ties"), chunks};
  const auto* wanted = data_of<int64_t>(k, first, ScalarType::Long, rankings, op, "k");
  const auto* free = data_of<int64_t>(candidates, first, ScalarType::Long, rankings, op, "candidates");
  const auto* guesses =
      guess ? data_of<float>(*guess, first, ScalarType::Float, rankings, op, "guess") : nullptr;
  auto* thresholds = data_of<float>(threshold, first, ScalarType::Float, rankings, op, "threshold");
  auto* ends = data_of<int64_t>(tie_end, first, ScalarType::Long, rankings, op, "tie_end");
  const OnDeviceOf device(first);
  select(sources.data(), static_cast<int64_t>(sources.size()), rankings, wanted, free, guesses, workspace,
         thresholds, ends, device.stream());
  if (unit == 0) return;
  SFPK_CHECK(masks.size() == values.size(), op, "masks", "one per tensor of values", masks.size());
  for (size_t i = 0; i < masks.size(); ++i) {
    check_rows(masks[i], first, rankings, ceil_div(sources[i].count, unit), op, "masks");
    SFPK_CHECK(masks[i].element_size() == (unit == 32 ? 4u : 1u), op, "masks", "the dtype of the unit",
               "another");
    write_mask(sources[i], rankings, thresholds, ends, static_cast<int>(unit), masks[i].data_ptr(),
               masks[i].stride(0) * static_cast<int64_t>(masks[i].element_size()), device.stream());
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CUDA, m) { m.impl("topk_device_", TORCH_BOX(&topk_device_)); }
