// The CUDA kernels compiled for the CPU, with plain entry points for tests/test_cuda_kernels.py.
#include <cuda_runtime_api.h>

#include <vector>

#include "masked_weights_kernels.cu"
#include "selection_kernels.cu"

using namespace sfpk;
using namespace sfpk::cuda;

extern "C" {

void emulated_window(int64_t blocks) { emulation::window = blocks; }

// One (rankings, count) tensor, or `tensors` of a list that lie one after the other with the given counts.
void emulated_select(const void* values, int kind, int score, int64_t rows, int64_t row_stride, int64_t rankings,
                     int64_t tensors, const int64_t* counts, const float* saliency, const uint8_t* excluded,
                     const uint8_t* always, const int64_t* k, const int64_t* candidates, const float* guess, int unit,
                     void* mask, int64_t row_bytes, float* threshold, int64_t* tie_end) {
  std::vector<Source> sources;
  int64_t first = 0, chunks = 0;
  const int64_t bytes = bytes_of(static_cast<FloatKind>(kind));
  for (int64_t i = 0; i < tensors; ++i) {
    Source s{};
    s.values = static_cast<const char*>(values) + first * bytes;
    s.kind = static_cast<FloatKind>(kind);
    s.score = static_cast<Score>(score);
    s.rows = rows;
    s.row_stride = row_stride;
    s.count = counts[i];
    s.first = first;
    s.scale = 1.0f / static_cast<float>(rows);
    s.saliency = saliency ? saliency + first : nullptr;
    s.excluded = excluded ? excluded + first : nullptr;
    s.always = always ? always + first : nullptr;
    s.row_excluded = s.row_always = counts[i];
    sources.push_back(s);
    first += counts[i];
    chunks += ceil_div(counts[i], kChunk);
  }
  std::vector<int64_t> state(rankings * kStateColumns, 77), ties(rankings * chunks + 1, emulation::window ? 0 : -7);
  std::vector<unsigned long long> bins(rankings * kCounters, 99);
  const Workspace w{state.data(), bins.data(), ties.data(), chunks};
  select(sources.data(), tensors, rankings, k, candidates, guess, w, threshold, tie_end, nullptr);
  if (unit > 0)
    for (const Source& s : sources)
      write_mask(s, rankings, threshold, tie_end, unit, static_cast<char*>(mask) + (unit == 1 ? s.first : 0), row_bytes,
                 nullptr);
}

void emulated_masked_weights(const void* weights, int kind, int64_t outer, int64_t groups, int64_t inner,
                             int64_t first, int mask_kind, const void* values, int values_kind, int64_t stride,
                             int bits, int score, const float* saliency, const float* threshold,
                             const int64_t* tie_end, const int64_t* borders, int64_t segments, int64_t rows, void* out,
                             int out_kind, int64_t out_stride) {
  const Piece piece{weights, static_cast<FloatKind>(kind), outer, groups, inner, first};
  const Mask mask{static_cast<MaskKind>(mask_kind), {values, static_cast<FloatKind>(values_kind), stride}, bits,
                  static_cast<Score>(score), saliency, threshold, tie_end, borders, segments};
  masked_weights(piece, mask, rows, out, static_cast<FloatKind>(out_kind), out_stride, nullptr);
}

// `out` is written, or with `adds` added to: then it is of fp64.
void emulated_mask_gradient(const void* weights, int kind, int64_t outer, int64_t groups, int64_t inner,
                            int64_t first, const void* grads, int grads_kind, int64_t stride, int64_t rows, int adds,
                            void* out, int64_t out_stride) {
  const Piece piece{weights, static_cast<FloatKind>(kind), outer, groups, inner, first};
  const Rows gradients{grads, static_cast<FloatKind>(grads_kind), stride};
  if (adds)
    mask_gradient<double>(piece, gradients, rows, {static_cast<double*>(out), out_stride}, nullptr);
  else
    mask_gradient<float>(piece, gradients, rows, {static_cast<float*>(out), out_stride}, nullptr);
}
}
