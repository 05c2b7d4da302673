// The schemas of every C++/CUDA kernel, mutation declared.
//
// These are the kernels behind the public ops. The public ops themselves (torch.ops.sfpk.*) are defined
// in Python, because they must exist on machines where this file was never compiled.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sfpk_cpp, m) {
  m.def("copy_(Tensor(a!) out, Tensor src) -> ()");
  m.def(
      "transition_(Tensor(a!) masks, Tensor grads, Tensor? weights, Tensor? saliency, Tensor? sizes, "
      "Tensor(b!)? residual, Tensor[] state, float step, float radius, float repulsion, bool weighted, "
      "bool squared, float? target_density, float consensus, float eps, int key, bool skip, int only, "
      "float? angle) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Its stages; mix: the (n, n) repulsion.
  m.def(
      "transition_mix(Tensor saliency_norms, Tensor sq_distances, int d, float repulsion, bool weighted) -> "
      "Tensor");
  m.def("transition_measure(Tensor masks, Tensor? residual, Tensor? saliency, Tensor? sizes) -> Tensor");
  m.def(
      "transition_sample(Tensor masks, Tensor? residual, Tensor grads, Tensor? weights, Tensor? saliency, "
      "Tensor? sizes, Tensor? mix, int only) -> Tensor");
  m.def(
      "transition_sums(Tensor masks, Tensor? residual, Tensor grads, Tensor? weights, Tensor? saliency, "
      "Tensor? sizes, Tensor? mix, int only, Tensor sample, bool grams) -> Tensor");
  m.def(
      "transition_plan(Tensor[] state, Tensor sample, Tensor sums, float total, bool sized, float step, "
      "float radius, bool weighted, bool squared, float? target_density, float consensus, float eps, "
      "bool skip, int only, float? angle) -> (Tensor, Tensor)");
  m.def(
      "transition_apply_(Tensor(a!) masks, Tensor(b!)? residual, Tensor grads, Tensor? weights, "
      "Tensor? saliency, Tensor? sizes, Tensor? mix, int only, Tensor coefficients, float consensus, "
      "int key, int first_column) -> Tensor");
  m.def(
      "transition_stats(Tensor sums, float total, bool weighted, bool squared) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "average_gradients_(Tensor(a!) grads, Tensor? averages, Tensor weights, float beta) -> (Tensor, "
      "Tensor)");
  m.def(
      "topk_(Tensor[] values, bool rows, int score, Tensor[] saliency, Tensor[] excluded, Tensor[] always, "
      "Tensor[] sizes, Tensor counts, Tensor segments, Tensor limits, Tensor? guess, int packing, "
      "Tensor(a!)[] masks, Tensor(b!) threshold, Tensor(c!) tie_end) -> int");
  m.def(
      "pattern_excluded_(Tensor[] values, bool rows, int score, Tensor[] saliency, Tensor[] excluded, "
      "Tensor[] always, int keep, int group, Tensor(a!)[] out) -> int");
  m.def(
      "masked_weights_(Tensor[] weights, Tensor mask, int kind, int score, Tensor? saliency, "
      "Tensor? threshold, Tensor? tie_end, Tensor segments, int[] layout, Tensor(a!)[] out) -> ()");
  m.def("mask_gradient_(Tensor[] weights, Tensor[] grads, int[] layout, Tensor(a!) out) -> ()");
  // On the GPU; present in every build, implemented in those with CUDA.
  m.def(
      "topk_device_(Tensor[] values, int score, Tensor[] saliency, Tensor[] excluded, Tensor[] always, "
      "Tensor k, "
      "Tensor candidates, Tensor? guess, int unit, Tensor(a!)[] masks, Tensor(b!) threshold, Tensor(c!) "
      "tie_end, "
      "Tensor(d!) state, Tensor(e!) bins, Tensor(f!) ties) -> ()");
  m.def(
      "masked_weights_device_(Tensor[] weights, Tensor mask, int kind, int score, Tensor? saliency, "
      "Tensor? threshold, Tensor? tie_end, Tensor borders, int[] layout, int coordinates, Tensor(a!)[] out) "
      "-> ()");
  m.def("mask_gradient_device_(Tensor[] weights, Tensor[] grads, int[] layout, Tensor(a!) out) -> ()");
  m.def("pack_(Tensor mask, Tensor(a!) out) -> ()");
  m.def("unpack_(Tensor packed, Tensor(a!) out) -> ()");
  m.def("popcount_(Tensor packed, Tensor(a!) out) -> ()");
  m.def("overlaps_(Tensor a, Tensor b, Tensor(a!) out) -> ()");
}
