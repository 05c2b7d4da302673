// The schemas of every C++/CUDA kernel, mutation declared, and the Python module `_C`.
//
// These are the kernels behind the public ops. The public ops themselves (torch.ops.sfpk.*) are defined
// in Python, because they must exist on machines where this file was never compiled.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "selection_keys.h"

STABLE_TORCH_LIBRARY(sfpk_cpp, m) {
  m.def("copy_(Tensor(a!) out, Tensor src) -> ()");
  m.def(
      "transition_(Tensor(a!) masks, Tensor grads, Tensor? weights, Tensor? saliency, Tensor? sizes, "
      "Tensor(b!)? residual, Tensor[] state, float step, float radius, float repulsion, bool weighted, "
      "bool squared, float? target_density, float consensus, float eps, int key, bool skip, int only) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "topk_(Tensor[] values, bool rows, int score, Tensor[] saliency, Tensor[] excluded, Tensor[] always, "
      "Tensor[] sizes, Tensor counts, Tensor segments, Tensor limits, Tensor? guess, int packing, "
      "Tensor(a!)[] masks, Tensor(b!) threshold, Tensor(c!) tie_end) -> int");
  m.def(
      "pattern_excluded_(Tensor[] values, bool rows, int score, Tensor[] saliency, Tensor[] excluded, "
      "Tensor[] always, int keep, int group, Tensor(a!)[] out) -> int");
  m.def(
      "masked_weights_(Tensor[] weights, Tensor mask, int kind, int score, Tensor? saliency, Tensor? "
      "threshold, "
      "Tensor? tie_end, Tensor segments, Tensor layout, Tensor(a!)[] out) -> ()");
  m.def("mask_gradient_(Tensor[] weights, Tensor[] grads, Tensor layout, Tensor(a!) out) -> ()");
  // On the GPU; present in every build, implemented in those with CUDA.
  m.def(
      "topk_device_(Tensor[] values, int score, Tensor[] saliency, Tensor[] excluded, Tensor[] always, "
      "Tensor k, "
      "Tensor candidates, Tensor? guess, int unit, Tensor(a!)[] masks, Tensor(b!) threshold, Tensor(c!) "
      "tie_end, "
      "Tensor(d!) state, Tensor(e!) bins, Tensor(f!) ties) -> ()");
  m.def(
      "masked_weights_device_(Tensor[] weights, Tensor mask, int kind, int score, Tensor? saliency, "
      "Tensor? threshold, Tensor? tie_end, Tensor borders, int[] layout, Tensor(a!)[] out) -> ()");
  m.def("mask_gradient_device_(Tensor[] weights, Tensor[] grads, int[] layout, Tensor(a!) out) -> ()");
  m.def("pack_(Tensor mask, Tensor(a!) out) -> ()");
  m.def("unpack_(Tensor packed, Tensor(a!) out) -> ()");
  m.def("popcount_(Tensor packed, Tensor(a!) out) -> ()");
  m.def("overlaps_(Tensor a, Tensor b, Tensor(a!) out) -> ()");
}

namespace {

pybind11::dict build_config() {
  pybind11::dict config;
#if defined(__clang__)
  config["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  config["compiler"] = std::string("gcc ") + __VERSION__;
#else
  config["compiler"] = "unknown";
#endif
#if defined(SFPK_CUDA)
  config["cuda"] = true;
#else
  config["cuda"] = false;
#endif
  config["cpp_standard"] = static_cast<long>(__cplusplus);
#if defined(_OPENMP)
  config["openmp"] = true;
#else
  config["openmp"] = false;
#endif
  config["cuda"] = false;
  return config;
}

// The helpers host and device kernels share, for the tests.
void define_selection_keys(pybind11::module_& module) {
  module.def("selection_key", &sfpk::key_from_float);
  module.def("selection_magnitude_key", &sfpk::key_from_magnitude);
  module.def("selection_score", &sfpk::float_from_key);
  module.def("selection_is_nan_key", &sfpk::is_nan_key);
  module.def("selection_bin_shift", &sfpk::bin_shift);
  module.def("selection_key_bin", &sfpk::key_bin);
  module.def("selection_is_kept", &sfpk::is_kept);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "C++ kernels of sfpk_kernels; importing it registers torch.ops.sfpk_cpp.";
  module.def("build_config", &build_config, "How this extension was compiled, as a dict.");
  define_selection_keys(module);
}
