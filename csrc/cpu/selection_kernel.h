// The selection's block kernels, written once and compiled once per instruction set (see
// selection_<isa>.cpp).
//
// Scores round exactly as in ops/selection/reference.py: one product, or a sum followed by two products. None
// of these can be fused into a multiply-add that rounds differently.
//
// No include guard and no includes: the including file chooses namespace, target and SFPK_LANES.

// Values of one row as fp32, in place or through `buffer`.
static inline const float* open_values(const Source& p, int64_t row, int64_t begin, int64_t count,
                                       float* buffer) {
  const int64_t first = row * p.row_stride + begin;
  if (p.kind == FloatKind::kFloat) return static_cast<const float*>(p.values) + first;
  const auto* bits = static_cast<const uint16_t*>(p.values) + first;
  if (p.kind == FloatKind::kBFloat16) {
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

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

static bool load_keys(const Source& p, int64_t begin, int64_t count, int32_t* __restrict__ keys) {
  alignas(64) float buffer[kBlock];
  alignas(64) float sum[kBlock];
  const float* x = open_values(p, 0, begin, count, buffer);
  const float* a = p.saliency ? p.saliency + begin : nullptr;
  int32_t nan = 0;
  switch (p.score) {
    case Score::kValue:
      for (int64_t e = 0; e < count; ++e) {
        keys[e] = key_from_bits(bits_of(x[e]));
        nan |= x[e] != x[e];
      }
      break;
    case Score::kAbs:
      for (int64_t e = 0; e < count; ++e) {
        keys[e] = key_from_magnitude(bits_of(x[e]));
        nan |= keys[e] > kInfinityKey;
      }
      break;
    case Score::kAbsSaliency:
      for (int64_t e = 0; e < count; ++e) {
        const float score = __builtin_fabsf(x[e]) * a[e];
        keys[e] = key_from_bits(bits_of(score));
        nan |= score != score;
      }
      break;
    case Score::kValueSaliency:
      for (int64_t e = 0; e < count; ++e) {
        const float score = x[e] * a[e];
        keys[e] = key_from_bits(bits_of(score));
        nan |= score != score;
      }
      break;
    case Score::kMeanAbsSaliency:
      for (int64_t e = 0; e < count; ++e) sum[e] = __builtin_fabsf(x[e]);
      for (int64_t row = 1; row < p.rows; ++row) {
        x = open_values(p, row, begin, count, buffer);
        for (int64_t e = 0; e < count; ++e) sum[e] += __builtin_fabsf(x[e]);
      }
      for (int64_t e = 0; e < count; ++e) {
        const float score = (sum[e] * a[e]) * p.scale;
        keys[e] = key_from_bits(bits_of(score));
        nan |= score != score;
      }
      break;
  }
  if (p.excluded) {
    const uint8_t* excluded = p.excluded + begin;
    for (int64_t e = 0; e < count; ++e) keys[e] = excluded[e] ? kNotCandidate : keys[e];
  }
  return nan != 0;
}

// Few keys are inside, so whole vectors without one are passed over.
static ScanCounts scan(const int32_t* keys, int64_t count, int32_t low, int32_t high, int32_t* out) {
  int64_t above = 0, inside = 0, e = 0;
#if SFPK_LANES == 16
  const __m512i lows = _mm512_set1_epi32(low), highs = _mm512_set1_epi32(high);
  for (; e + 16 <= count; e += 16) {
    const __m512i v = _mm512_loadu_si512(keys + e);
    const __mmask16 over = _mm512_cmpgt_epi32_mask(v, highs);
    const __mmask16 in = _mm512_mask_cmpge_epi32_mask(static_cast<__mmask16>(~over), v, lows);
    if (out) _mm512_storeu_si512(out + inside, _mm512_maskz_compress_epi32(in, v));
    above += __builtin_popcount(over);
    inside += __builtin_popcount(in);
  }
#elif SFPK_LANES == 8
  const __m256i lows = _mm256_set1_epi32(low), highs = _mm256_set1_epi32(high);
  for (; e + 8 <= count; e += 8) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + e));
    const __m256i over = _mm256_cmpgt_epi32(v, highs);
    const __m256i out_of_range = _mm256_or_si256(over, _mm256_cmpgt_epi32(lows, v));
    unsigned in = 0xffu & ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(out_of_range)));
    above += __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(over))));
    if (!out) {
      inside += __builtin_popcount(in);
      continue;
    }
    for (; in; in &= in - 1) out[inside++] = keys[e + __builtin_ctz(in)];
  }
#else
  for (; e + 32 <= count; e += 32) {
    int32_t over = 0, in = 0;
    for (int64_t i = e; i < e + 32; ++i) {
      over += keys[i] > high;
      in += (keys[i] >= low) & (keys[i] <= high);
    }
    above += over;
    if (!out || in == 0) {
      inside += in;
      continue;
    }
    for (int64_t i = e; i < e + 32; ++i) {
      out[inside] = keys[i];
      inside += (keys[i] >= low) & (keys[i] <= high);
    }
  }
#endif
  for (; e < count; ++e) {
    above += keys[e] > high;
    if (keys[e] < low || keys[e] > high) continue;
    if (out) out[inside] = keys[e];
    ++inside;
  }
  return {above, inside};
}

static void compare(const int32_t* __restrict__ keys, int64_t count, int32_t threshold,
                    uint8_t* __restrict__ out) {
  for (int64_t e = 0; e < count; ++e) out[e] = keys[e] > threshold;
}

const SelectionKernels kSelection = {load_keys, scan, compare};
