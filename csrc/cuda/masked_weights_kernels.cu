// θ ⊙ mask on the device: one read of mask and weights, one write; and its gradient by the mask.
#include "integers.h"
#include "launch.h"
#include "masked_weights.h"
#include "scores.cuh"

namespace sfpk::cuda {

namespace {

constexpr int kEntries = 4 * kThreads;  // weights of a block

__device__ inline void store_float(void* out, FloatKind kind, int64_t at, float value) {
  if (kind == FloatKind::kFloat)
    static_cast<float*>(out)[at] = value;
  else
    static_cast<uint16_t*>(out)[at] =
        kind == FloatKind::kBFloat16 ? bfloat16_from_float_or_nan(value) : half_from_float(value);
}

// The segment of a coordinate: the last border not behind it.
__device__ inline int64_t segment_of(const Mask& mask, int64_t coordinate) {
  int64_t low = 0, high = mask.segments;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (mask.borders[middle] <= coordinate)
      low = middle;
    else
      high = middle;
  }
  return low;
}

__device__ inline bool is_kept_by(const Mask& mask, int64_t row, int64_t coordinate, int64_t segment) {
  if (mask.kind == MaskKind::kBool)
    return static_cast<const uint8_t*>(mask.values.data)[row * mask.values.stride + coordinate] != 0;
  if (mask.kind == MaskKind::kPacked) {
    const auto* bytes =
        static_cast<const uint8_t*>(mask.values.data) + row * mask.values.stride * (mask.bits / 8);
    return bytes[coordinate / 8] >> (coordinate % 8) & 1;
  }
  float score = load_float(mask.values.data, mask.values.kind, row * mask.values.stride + coordinate);
  if (drops_sign(mask.score)) score = fabsf(score);
  if (needs_saliency(mask.score)) score *= mask.saliency[coordinate];
  const int64_t cut = row * mask.segments + segment;
  const float threshold = mask.threshold[cut];
  return score > threshold || (score == threshold && coordinate < mask.tie_end[cut]);
}

__global__ void apply(Piece piece, Mask mask, int64_t rows, void* out, FloatKind out_kind,
                      int64_t out_stride) {
  const int64_t count = piece.count();
  const bool single = piece.single();
  for (int e = threadIdx.x; e < kEntries; e += kThreads) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kEntries + e;
    if (at >= count) return;
    const float weight = load_float(piece.weights, piece.kind, at);
    const int64_t coordinate = piece.first + (single ? at : at / piece.inner % piece.groups);
    const int64_t segment = mask.segments > 1 ? segment_of(mask, coordinate) : 0;
    for (int64_t row = 0; row < rows; ++row) {
      float value;
      if (mask.kind == MaskKind::kFactors)
        value =
            weight * load_float(mask.values.data, mask.values.kind, row * mask.values.stride + coordinate);
      else
        value = is_kept_by(mask, row, coordinate, segment) ? weight : 0.0f;
      store_float(out, out_kind, row * out_stride + at, value);
    }
  }
}

__device__ inline void store_result(const Results<float>& out, int64_t at, double value) {
  out.data[at] = static_cast<float>(value);
}

// One thread has a coordinate, and pieces that share it are launched one after the other: no atomics.
__device__ inline void store_result(const Results<double>& out, int64_t at, double value) {
  out.data[at] += value;
}

template <class Float>
__global__ void single_products(Piece piece, Rows grads, int64_t rows, Results<Float> out) {
  for (int e = threadIdx.x; e < kEntries; e += kThreads) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kEntries + e;
    if (at >= piece.groups) return;
    const float weight = load_float(piece.weights, piece.kind, at);
    for (int64_t row = 0; row < rows; ++row)
      store_result(out, row * out.stride + piece.first + at,
                   __fmul_rn(weight, load_float(grads.data, grads.kind, row * grads.stride + at)));
  }
}

// A block sums one group of one row: fixed shares of the threads, then a tree, so the order is always the
// same.
template <class Float>
__global__ void group_sum(Piece piece, Rows grads, Results<Float> out) {
  __shared__ double sums[kThreads];
  const int64_t group = blockIdx.x, row = blockIdx.y, size = piece.outer * piece.inner;
  double own = 0;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const int64_t at = (i / piece.inner * piece.groups + group) * piece.inner + i % piece.inner;
    own += __fmul_rn(load_float(piece.weights, piece.kind, at),
                     load_float(grads.data, grads.kind, row * grads.stride + at));
  }
  sums[threadIdx.x] = own;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) store_result(out, row * out.stride + piece.first + group, sums[0]);
}

}  // namespace

void masked_weights(const Piece& piece, const Mask& mask, int64_t rows, void* out, FloatKind out_kind,
                    int64_t out_stride, cudaStream_t stream) {
  SFPK_LAUNCH(apply, ceil_div(piece.count(), kEntries), rows > 0, stream, piece, mask, rows, out, out_kind,
              out_stride);
}

template <class Float>
void mask_gradient(const Piece& piece, const Rows& grads, int64_t rows, const Results<Float>& out,
                   cudaStream_t stream) {
  if (piece.single())
    SFPK_LAUNCH(single_products<Float>, ceil_div(piece.groups, kEntries), rows > 0, stream, piece, grads,
                rows, out);
  else
    SFPK_LAUNCH(group_sum<Float>, piece.groups, rows, stream, piece, grads, out);
}

template void mask_gradient(const Piece&, const Rows&, int64_t, const Results<float>&, cudaStream_t);
template void mask_gradient(const Piece&, const Rows&, int64_t, const Results<double>&, cudaStream_t);

}  // namespace sfpk::cuda
