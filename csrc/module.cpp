// The Python module `_C`: how it was compiled, and helpers for the tests. Importing it registers
// torch.ops.sfpk_cpp, whose schemas are in registration.cpp.
//
// The pybind11 that torch 2.10 to 2.12 bring refuses to be compiled for the stable ABI. Nothing of torch is
// used here.
#undef TORCH_TARGET_VERSION

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "codes.h"
#include "cuda/selection_workspace.h"
#include "selection_keys.h"

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
  return config;
}

// One entry per name of codes.h and cuda/selection_workspace.h, named as in ops/codes.py.
pybind11::dict codes() {
  using namespace sfpk;
  using Values = std::map<std::string, int>;
  const auto number = [](auto code) { return static_cast<int>(code); };
  pybind11::dict all;
  all["FloatKind"] = Values{{"FLOAT", number(FloatKind::kFloat)},
                            {"BFLOAT16", number(FloatKind::kBFloat16)},
                            {"HALF", number(FloatKind::kHalf)}};
  all["Score"] = Values{{"VALUE", number(Score::kValue)},
                        {"ABS", number(Score::kAbs)},
                        {"ABS_SALIENCY", number(Score::kAbsSaliency)},
                        {"VALUE_SALIENCY", number(Score::kValueSaliency)},
                        {"MEAN_ABS_SALIENCY", number(Score::kMeanAbsSaliency)}};
  all["MaskKind"] = Values{{"BOOL", number(MaskKind::kBool)},
                           {"PACKED", number(MaskKind::kPacked)},
                           {"FACTORS", number(MaskKind::kFactors)},
                           {"CUT", number(MaskKind::kCut)}};
  all["Packing"] = Values{{"NONE", number(Packing::kNone)},
                          {"BOOL", number(Packing::kBool)},
                          {"UINT8", number(Packing::kUint8)},
                          {"INT32", number(Packing::kInt32)}};
  all["TANGENT_TOLERANCE"] = kTangentTolerance;
  all["MIX_FIRST"] = kMixFirst;
  all["MIX_SECOND"] = kMixSecond;
  all["ROW_STRIDE"] = kRowStride;
  all["HIGH_STRIDE"] = kHighStride;
  all["MOST_ROWS"] = kMostRows;
  all["SELECTION_CHUNK"] = cuda::kChunk;
  all["SELECTION_STATE_COLUMNS"] = cuda::kStateColumns;
  all["SELECTION_COUNTERS"] = cuda::kCounters;
  return all;
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
  module.def("codes", &codes, "The codes and numbers that the kernels share with Python, by name.");
  define_selection_keys(module);
}
