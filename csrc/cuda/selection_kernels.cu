// Exact selection on the device: histograms of 2,048 bins over a narrowing range of keys, then the tie cut.
//
// Every pass counts the keys in [low, high] by bin and those above; the counts say in which bin the cut lies,
// or on which side of the range. From the whole range three passes suffice (shifts 21, 10, 0), from a good
// guess two. Counts are integers, so the order of the atomic additions changes nothing. Passes that have
// nothing left to do return at once: the host never needs to know.
#include "integers.h"
#include "launch.h"
#include "scores.cuh"
#include "selection.h"

namespace sfpk::cuda {

namespace {

enum Column { kLow, kHigh, kRank, kEqual, kNaN, kDone, kTieChunk };

constexpr int kPasses = 3;
constexpr int64_t kLongestRun = kChunk / kThreads;  // entries of a chunk one thread walks through

__device__ void set_range(int64_t* state, int64_t low, int64_t high) {
  state[kLow] = low;
  state[kHigh] = high;
}

__global__ void start(const int64_t* k, const int64_t* candidates, const float* guess, Workspace w) {
  const int64_t ranking = blockIdx.y;
  for (int64_t b = threadIdx.x; b < kCounters; b += kThreads) w.bins[ranking * kCounters + b] = 0;
  if (threadIdx.x > 0) return;
  int64_t* state = w.state + ranking * kStateColumns;
  const int64_t most = candidates[ranking] > 0 ? candidates[ranking] : 1;
  const int64_t rank = k[ranking] < 1 ? 1 : k[ranking];
  state[kRank] = rank < most ? rank : most;
  state[kEqual] = state[kNaN] = state[kDone] = 0;
  state[kTieChunk] = -1;
  set_range(state, kLowestKey, kInfinityKey);
  if (!guess) return;
  const float middle = guess[ranking], margin = fabsf(middle) * kGuessMargin;
  if (isfinite(middle) && isfinite(middle - margin) && isfinite(middle + margin))
    set_range(state, key_from_float(middle - margin), key_from_float(middle + margin));
}

__global__ void count_keys(Source source, Workspace w) {
  __shared__ int bins[kCounters];
  __shared__ int nan;
  const int64_t ranking = blockIdx.y;
  int64_t* state = w.state + ranking * kStateColumns;
  if (state[kDone]) return;
  for (int64_t b = threadIdx.x; b < kCounters; b += kThreads) bins[b] = 0;
  if (threadIdx.x == 0) nan = 0;
  __syncthreads();
  const int32_t low = static_cast<int32_t>(state[kLow]), high = static_cast<int32_t>(state[kHigh]);
  const int shift = bin_shift(low, high);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk;
  const int64_t end = begin + kChunk < source.count ? begin + kChunk : source.count;
  int above = 0;
  bool bad = false;
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
    const int32_t key = key_at(source, ranking, at);
    bad |= key != kNotCandidate && is_nan_key(key);
    above += key > high;
    if (key >= low && key <= high) atomicAdd(&bins[key_bin(key, low, shift)], 1);
  }
  if (above) atomicAdd(&bins[kBins], above);
  if (bad) atomicAdd(&nan, 1);
  __syncthreads();
  for (int64_t b = threadIdx.x; b < kCounters; b += kThreads)
    if (bins[b]) atomicAdd(&w.bins[ranking * kCounters + b], static_cast<unsigned long long>(bins[b]));
  if (threadIdx.x == 0 && nan) state[kNaN] = 1;
}

// The sum of a block's values before this thread's, in thread order.
__device__ int64_t sum_before(int64_t value, int64_t* shared, int64_t& total) {
  shared[threadIdx.x] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t sum = 0;
    for (int t = 0; t < kThreads; ++t) {
      const int64_t own = shared[t];
      shared[t] = sum;
      sum += own;
    }
    shared[kThreads] = sum;
  }
  __syncthreads();
  total = shared[kThreads];
  return shared[threadIdx.x];
}

// Narrows the range by the counts, and clears them. Thread t looks at the t-th run of bins from the top.
__global__ void narrow(Workspace w) {
  __shared__ int64_t sums[kThreads + 1];
  constexpr int kRun = kBins / kThreads;
  const int64_t ranking = blockIdx.y;
  int64_t* state = w.state + ranking * kStateColumns;
  unsigned long long* bins = w.bins + ranking * kCounters;
  if (state[kDone]) return;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kRun;
  int64_t own = 0;
  for (int i = 0; i < kRun; ++i) own += static_cast<int64_t>(bins[top - i]);
  int64_t inside;
  const int64_t before = sum_before(own, sums, inside);
  const int64_t above = static_cast<int64_t>(bins[kBins]);
  const int64_t rank = state[kRank] - above;
  const int64_t low = state[kLow], high = state[kHigh];
  const int shift = bin_shift(static_cast<int32_t>(low), static_cast<int32_t>(high));
  __syncthreads();  // everybody has read the state
  if (threadIdx.x == 0 && rank <= 0) set_range(state, high + 1, kInfinityKey);
  if (threadIdx.x == 0 && rank > inside) set_range(state, kLowestKey, low - 1);
  if (rank > before && rank <= before + own) {
    int64_t left = rank - before;
    int bin = top;
    for (; left > static_cast<int64_t>(bins[bin]); --bin) left -= static_cast<int64_t>(bins[bin]);
    const int64_t first = low + (static_cast<int64_t>(bin) << shift);
    const int64_t last = first + (int64_t{1} << shift) - 1;
    set_range(state, first, last < high ? last : high);
    if (shift == 0) {
      state[kRank] = left;
      state[kEqual] = static_cast<int64_t>(bins[bin]);
      state[kDone] = 1;
    }
  }
  __syncthreads();
  for (int64_t b = threadIdx.x; b < kCounters; b += kThreads) bins[b] = 0;
}

__device__ bool cuts_ties(const int64_t* state) { return state[kDone] && state[kRank] < state[kEqual]; }

__global__ void count_ties(Source source, Workspace w, int64_t first_chunk) {
  __shared__ int found;
  const int64_t ranking = blockIdx.y;
  const int64_t* state = w.state + ranking * kStateColumns;
  if (!cuts_ties(state)) return;
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  const int32_t cut = static_cast<int32_t>(state[kLow]);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk;
  const int64_t end = begin + kChunk < source.count ? begin + kChunk : source.count;
  int own = 0;
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) own += key_at(source, ranking, at) == cut;
  if (own) atomicAdd(&found, own);
  __syncthreads();
  if (threadIdx.x == 0) w.ties[ranking * w.chunks + first_chunk + blockIdx.x] = found;
}

// The threshold; the tie end where all ties are kept, else the chunk in which it lies.
__global__ void find_chunk(const int64_t* k, const int64_t* candidates, Workspace w, int64_t d,
                           float* threshold, int64_t* tie_end) {
  __shared__ int64_t sums[kThreads + 1];
  const int64_t ranking = blockIdx.y;
  int64_t* state = w.state + ranking * kStateColumns;
  const bool none = k[ranking] <= 0, everything = !none && k[ranking] >= candidates[ranking];
  const bool nan = state[kNaN] != 0, cuts = cuts_ties(state);
  const int64_t rank = state[kRank];
  if (threadIdx.x == 0) {
    float score = float_from_key(static_cast<int32_t>(state[kLow]));
    if (everything) score = -INFINITY;
    if (none) score = INFINITY;
    threshold[ranking] = nan ? NAN : score;
    tie_end[ranking] = none || nan ? 0 : d;
  }
  if (!cuts || none || everything || nan) return;
  const int64_t run = ceil_div(w.chunks, kThreads);
  const int64_t begin = threadIdx.x * run, end = begin + run < w.chunks ? begin + run : w.chunks;
  const int64_t* ties = w.ties + ranking * w.chunks;
  int64_t own = 0, total;
  for (int64_t c = begin; c < end; ++c) own += ties[c];
  const int64_t before = sum_before(own, sums, total);
  if (rank <= before || rank > before + own) return;
  int64_t left = rank - before, chunk = begin;
  for (; left > ties[chunk]; ++chunk) left -= ties[chunk];
  state[kTieChunk] = chunk;
  state[kRank] = left;
}

// One past the last kept tie, where it lies in this source.
__global__ void find_tie(Source source, Workspace w, int64_t first_chunk, int64_t last_chunk,
                         int64_t* tie_end) {
  __shared__ int64_t sums[kThreads + 1];
  const int64_t ranking = blockIdx.y;
  const int64_t* state = w.state + ranking * kStateColumns;
  const int64_t chunk = state[kTieChunk];
  if (chunk < first_chunk || chunk >= last_chunk) return;
  const int32_t cut = static_cast<int32_t>(state[kLow]);
  const int64_t begin = (chunk - first_chunk) * kChunk + threadIdx.x * kLongestRun;
  const int64_t end = begin + kLongestRun < source.count ? begin + kLongestRun : source.count;
  int64_t own = 0, total;
  for (int64_t at = begin; at < end; ++at) own += key_at(source, ranking, at) == cut;
  const int64_t before = sum_before(own, sums, total);
  const int64_t rank = state[kRank];
  if (rank <= before || rank > before + own) return;
  int64_t left = rank - before;
  for (int64_t at = begin; at < end; ++at) {
    if (key_at(source, ranking, at) != cut || --left > 0) continue;
    tie_end[ranking] = source.first + at + 1;
    return;
  }
}

// A block's entries: one a thread at a time, then packed by unit.
__global__ void mask_block(Source source, const float* threshold, const int64_t* tie_end, int unit,
                           uint8_t* out, int64_t row_bytes) {
  constexpr int kEntries = 4 * kThreads;
  __shared__ uint8_t keep[kEntries];
  const int64_t ranking = blockIdx.y;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kEntries;
  const float limit = threshold[ranking];
  const int64_t ties = tie_end[ranking];
  const int32_t cut = key_from_float(limit);
  const bool none = limit != limit;
  uint8_t* row = out + ranking * row_bytes;
  for (int e = threadIdx.x; e < kEntries; e += kThreads) {
    const int64_t at = begin + e;
    bool kept = false;
    if (at < source.count) {
      const int32_t key = key_at(source, ranking, at);
      kept = !none && key != kNotCandidate && !is_nan_key(key) && is_kept(key, source.first + at, cut, ties);
      if (source.always) kept |= source.always[ranking * source.row_always + at] != 0;
      if (unit == 1) row[at] = kept;
    }
    keep[e] = kept;
  }
  if (unit == 1) return;
  __syncthreads();
  for (int u = threadIdx.x; u < kEntries / unit; u += kThreads) {
    if (begin + static_cast<int64_t>(u) * unit >= source.count) continue;
    uint32_t bits = 0;
    for (int i = 0; i < unit; ++i) bits |= static_cast<uint32_t>(keep[u * unit + i]) << i;
    if (unit == 8)
      row[begin / 8 + u] = static_cast<uint8_t>(bits);
    else
      reinterpret_cast<uint32_t*>(row)[begin / 32 + u] = bits;
  }
}

}  // namespace

void select(const Source* sources, int64_t count, int64_t rankings, const int64_t* k,
            const int64_t* candidates, const float* guess, const Workspace& w, float* threshold,
            int64_t* tie_end, cudaStream_t stream) {
  SFPK_LAUNCH(start, 1, rankings, stream, k, candidates, guess, w);
  for (int pass = 0; pass < kPasses + (guess ? 1 : 0); ++pass) {
    for (int64_t i = 0; i < count; ++i)
      SFPK_LAUNCH(count_keys, ceil_div(sources[i].count, kChunk), rankings, stream, sources[i], w);
    SFPK_LAUNCH(narrow, 1, rankings, stream, w);
  }
  int64_t chunk = 0, d = 0;
  for (int64_t i = 0; i < count; ++i) {
    SFPK_LAUNCH(count_ties, ceil_div(sources[i].count, kChunk), rankings, stream, sources[i], w, chunk);
    chunk += ceil_div(sources[i].count, kChunk);
    d += sources[i].count;
  }
  SFPK_LAUNCH(find_chunk, 1, rankings, stream, k, candidates, w, d, threshold, tie_end);
  chunk = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t last = chunk + ceil_div(sources[i].count, kChunk);
    SFPK_LAUNCH(find_tie, 1, rankings, stream, sources[i], w, chunk, last, tie_end);
    chunk = last;
  }
}

void write_mask(const Source& source, int64_t rankings, const float* threshold, const int64_t* tie_end,
                int unit, void* out, int64_t row_bytes, cudaStream_t stream) {
  SFPK_LAUNCH(mask_block, ceil_div(source.count, 4 * kThreads), rankings, stream, source, threshold, tie_end,
              unit, static_cast<uint8_t*>(out), row_bytes);
}

}  // namespace sfpk::cuda
