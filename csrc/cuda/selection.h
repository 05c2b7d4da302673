// The bridge between the op (selection_op.cpp, which knows torch) and its kernels (selection_kernels.cu,
// which do not).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "codes.h"
#include "selection_workspace.h"

namespace sfpk::cuda {

// Rows of one tensor, or one tensor of a list; all pointers on the device.
struct Source {
  const void* values;
  FloatKind kind;
  Score score;
  int64_t rows, row_stride;  // rows > 1 only for kMeanAbsSaliency
  int64_t count;
  int64_t first;            // flat index of entry 0
  float scale;              // 1 / rows
  const float* saliency;    // (count), or null
  const uint8_t* excluded;  // bools that are no candidates, or null
  int64_t row_excluded;
  const uint8_t* always;  // bools kept whatever the ranking says, or null
  int64_t row_always;
};

struct Workspace {
  int64_t* state;            // (rankings, kStateColumns)
  unsigned long long* bins;  // (rankings, kCounters)
  int64_t* ties;             // (rankings, chunks)
  int64_t chunks;            // of all sources together
};

// Threshold and tie end of every ranking. All asynchronous on `stream`: nothing is read back. A NaN score
// gives the threshold NaN and the tie end 0, which keeps nothing.
void select(const Source* sources, int64_t count, int64_t rankings,
            const int64_t* k,           // (rankings), clamped to 0 … candidates
            const int64_t* candidates,  // (rankings)
            const float* guess,         // (rankings), or null
            const Workspace& workspace,
            float* threshold,  // (rankings)
            int64_t* tie_end,  // (rankings)
            cudaStream_t stream);

// The mask of one source by cuts: bools (unit 1), or bits in units of 8 or 32; `row_bytes` apart.
void write_mask(const Source& source, int64_t rankings, const float* threshold, const int64_t* tie_end,
                int unit, void* out, int64_t row_bytes, cudaStream_t stream);

}  // namespace sfpk::cuda
