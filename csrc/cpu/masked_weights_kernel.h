// The block kernels of masked weights, written once and compiled once per instruction set (see
// masked_weights_<isa>.cpp).
//
// No include guard and no system headers: the including file chooses namespace, target and SFPK_LANES.

#include "floats_kernel.h"

static void select(const void* weights, FloatKind kind, const uint8_t* __restrict__ keep, int64_t count,
                   void* out, FloatKind out_kind) {
  if (kind == out_kind && kind != FloatKind::kFloat) {
    const auto* from = static_cast<const uint16_t*>(weights);
    auto* __restrict__ to = static_cast<uint16_t*>(out);
    for (int64_t e = 0; e < count; ++e) to[e] = keep[e] ? from[e] : 0;
    return;
  }
  alignas(64) float buffer[kBlock];
  alignas(64) float kept[kBlock];
  const float* from = open_floats(weights, kind, count, buffer);
  float* __restrict__ to = out_kind == FloatKind::kFloat ? static_cast<float*>(out) : kept;
  for (int64_t e = 0; e < count; ++e) to[e] = keep[e] ? from[e] : 0.0f;
  if (out_kind != FloatKind::kFloat) close_floats(kept, out_kind, count, out);
}

static void scale(const void* weights, FloatKind kind, const void* factors, FloatKind factors_kind,
                  int64_t count, void* out, FloatKind out_kind) {
  alignas(64) float left[kBlock];
  alignas(64) float right[kBlock];
  alignas(64) float product[kBlock];
  const float* from = open_floats(weights, kind, count, left);
  const float* by = open_floats(factors, factors_kind, count, right);
  float* __restrict__ to = out_kind == FloatKind::kFloat ? static_cast<float*>(out) : product;
  for (int64_t e = 0; e < count; ++e) to[e] = from[e] * by[e];
  if (out_kind != FloatKind::kFloat) close_floats(product, out_kind, count, out);
}

template <bool kAbsolute, bool kSaliency, bool kTies>
static inline void keep_scores(const float* __restrict__ x, const float* __restrict__ a, float threshold,
                               const float* __restrict__ from, int64_t count, float* __restrict__ to) {
  for (int64_t e = 0; e < count; ++e) {
    float score = kAbsolute ? __builtin_fabsf(x[e]) : x[e];
    if (kSaliency) score *= a[e];
    const bool keep = kTies ? score >= threshold : score > threshold;
    to[e] = keep ? from[e] : 0.0f;
  }
}

static void select_cut(const void* weights, FloatKind kind, const CutBlock& b, int64_t count, void* out,
                       FloatKind out_kind) {
  alignas(64) float values[kBlock];
  alignas(64) float buffer[kBlock];
  alignas(64) float kept[kBlock];
  const float* x = open_floats(b.values, b.kind, count, values);
  const float* from = open_floats(weights, kind, count, buffer);
  float* to = out_kind == FloatKind::kFloat ? static_cast<float*>(out) : kept;
  const auto keep =
      b.saliency
          ? (b.absolute ? (b.ties ? keep_scores<true, true, true> : keep_scores<true, true, false>)
                        : (b.ties ? keep_scores<false, true, true> : keep_scores<false, true, false>))
          : (b.absolute ? (b.ties ? keep_scores<true, false, true> : keep_scores<true, false, false>)
                        : (b.ties ? keep_scores<false, false, true> : keep_scores<false, false, false>));
  keep(x, b.saliency, b.threshold, from, count, to);
  if (out_kind != FloatKind::kFloat) close_floats(kept, out_kind, count, out);
}

static void stream(const void* from, int64_t bytes, void* to) {
#if SFPK_LANES == 16
  constexpr int64_t kWide = 64;
#elif SFPK_LANES == 8
  constexpr int64_t kWide = 32;
#else
  constexpr int64_t kWide = 1;
#endif
  const auto* source = static_cast<const char*>(from);
  auto* target = static_cast<char*>(to);
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(target) % kWide);
  int64_t at = past ? (bytes < kWide - past ? bytes : kWide - past) : 0;
  __builtin_memcpy(target, source, static_cast<size_t>(at));
#if SFPK_LANES == 16
  for (; at + kWide <= bytes; at += kWide)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), _mm512_loadu_si512(source + at));
#elif SFPK_LANES == 8
  for (; at + kWide <= bytes; at += kWide)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + at),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + at)));
#endif
  __builtin_memcpy(target + at, source + at, static_cast<size_t>(bytes - at));
}

static void fence() {
#if SFPK_LANES >= 8
  _mm_sfence();
#endif
}

const MaskedKernels kMasked = {select, select_cut, scale, stream, fence};
