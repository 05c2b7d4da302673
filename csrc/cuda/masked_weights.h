// The bridge between the op (masked_weights_op.cpp, which knows torch) and its kernels
// (masked_weights_kernels.cu, which do not).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "codes.h"

namespace sfpk::cuda {

// Rows of values; `stride` in entries.
struct Rows {
  const void* data;
  FloatKind kind;
  int64_t stride;
};

// Weights seen as (outer, groups, inner), governed by the coordinates [first, first + groups).
struct Weights {
  const void* data;
  FloatKind kind;
  int64_t outer, groups, inner, first;
};

struct Mask {
  MaskKind kind;
  Rows values;
  int bits;  // of a packed unit
  Score score;
  const float* saliency;
  const float* threshold;  // (rows, segments)
  const int64_t* tie_end;  // (rows, segments)
  const int64_t* borders;  // (segments + 1) on the device
  int64_t segments;
};

void masked_weights(const Weights& weights, const Mask& mask, int64_t rows, void* out, FloatKind out_kind,
                    int64_t out_stride, cudaStream_t stream);

// out[first + g] = Σ of weights · grads over what group g governs, for every row.
void mask_gradient(const Weights& weights, const Rows& grads, int64_t rows, float* out, int64_t out_stride,
                   cudaStream_t stream);

}  // namespace sfpk::cuda
