// The bridge between the op (masked_weights_op.cpp, which knows torch) and its kernels
// (masked_weights_kernels.cu, which do not).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "codes.h"
#include "piece.h"

namespace sfpk::cuda {

// Rows of values; `stride` in entries.
struct Rows {
  const void* data;
  FloatKind kind;
  int64_t stride;
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

void masked_weights(const Piece& piece, const Mask& mask, int64_t rows, void* out, FloatKind out_kind,
                    int64_t out_stride, cudaStream_t stream);

// Rows of results, `stride` entries apart: fp32 is written, fp64 added to.
template <class Float>
struct Results {
  Float* data;
  int64_t stride;
};

// Σ of weights · grads over what each coordinate of the piece governs, for every row; float or double.
template <class Float>
void mask_gradient(const Piece& piece, const Rows& grads, int64_t rows, const Results<Float>& out,
                   cudaStream_t stream);

}  // namespace sfpk::cuda
