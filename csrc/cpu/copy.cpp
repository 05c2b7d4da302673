// copy_: out <- src on torch's thread pool. It is the ceiling benchmarks measure every other kernel against,
// so it runs the way those kernels run: same pool, same grain.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>

#include "checks.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t kGrainBytes = int64_t{1} << 18;

void copy_(Tensor out,         // any shape, contiguous
           const Tensor& src)  // the same shape and dtype, contiguous
{
  SFPK_CHECK(out.is_contiguous() && src.is_contiguous(), "copy_", "out, src", "contiguous tensors",
             "a strided one");
  SFPK_CHECK(out.numel() == src.numel(), "copy_", "src", out.numel(), src.numel(), " elements");
  SFPK_CHECK(out.scalar_type() == src.scalar_type(), "copy_", "src", "the dtype of out", "another dtype");
  const int64_t bytes = src.numel() * static_cast<int64_t>(src.element_size());
  if (bytes == 0) return;
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const auto* from = static_cast<const char*>(src.const_data_ptr());
  torch::stable::parallel_for(0, bytes, kGrainBytes, [=](int64_t begin, int64_t end) {
    std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CPU, m) { m.impl("copy_", TORCH_BOX(&copy_)); }
