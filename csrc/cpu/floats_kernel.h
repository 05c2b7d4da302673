// Blocks of floats of any kind as fp32, and back.
//
// No include guard and no includes: the including file chooses namespace, target and SFPK_LANES.

// Values as fp32, in place or through `buffer`.
static inline const float* open_floats(const void* values, FloatKind kind, int64_t count, float* buffer) {
  if (kind == FloatKind::kFloat) return static_cast<const float*>(values);
  const auto* bits = static_cast<const uint16_t*>(values);
  if (kind == FloatKind::kBFloat16) {
    for (int64_t e = 0; e < count; ++e) buffer[e] = float_from_bfloat16(bits[e]);
  } else {
    int64_t e = 0;
#if SFPK_LANES >= 8  // the instruction's results are those of float_from_half
    for (; e + 8 <= count; e += 8)
      _mm256_storeu_ps(buffer + e,
                       _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + e))));
#endif
    for (; e < count; ++e) buffer[e] = float_from_half(bits[e]);
  }
  return buffer;
}

static inline void close_floats(const float* values, FloatKind kind, int64_t count, void* out) {
  auto* bits = static_cast<uint16_t*>(out);
  if (kind == FloatKind::kBFloat16) {
    for (int64_t e = 0; e < count; ++e) bits[e] = bfloat16_from_float_or_nan(values[e]);
  } else {
    int64_t e = 0;
#if SFPK_LANES >= 8
    for (; e + 8 <= count; e += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bits + e),
                       _mm256_cvtps_ph(_mm256_loadu_ps(values + e), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; e < count; ++e) bits[e] = half_from_float(values[e]);
  }
}
