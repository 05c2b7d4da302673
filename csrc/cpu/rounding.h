// Stochastic rounding to fp16, the same bits as sfpk_kernels/ops/transition/rounding.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "codes.h"

namespace sfpk {

// A bijection of 32-bit words whose every input bit flips half of the output bits (lowbias32).
inline uint32_t mix_bits(uint32_t x) {
  x ^= x >> 16;
  x *= kMixFirst;
  x ^= x >> 15;
  x *= kMixSecond;
  return x ^ (x >> 16);
}

// The random words of one row of particles.
struct RowBits {
  uint32_t first, second;

  RowBits(uint64_t key, int64_t row) {
    first = mix_bits(static_cast<uint32_t>(key & 0x7fffffffu) + static_cast<uint32_t>(row) * kRowStride);
    second = mix_bits(first ^ static_cast<uint32_t>(key >> 31));
  }
  uint32_t at(int64_t column) const {
    const auto low = static_cast<uint32_t>(column);
    const auto high = static_cast<uint32_t>(static_cast<uint64_t>(column) >> 32);
    return mix_bits(mix_bits(low ^ first) + second + high * kHighStride);
  }
};

// One of the fp16 neighbours of `value`, the value itself in the mean over `random`; at most 65504 in size.
inline float round_to_half(float value, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits & 0x80000000u, largest = 0x477fe000u;
  bits &= 0x7fffffffu;
  bits = bits > largest ? largest : bits;
  float size;
  std::memcpy(&size, &bits, sizeof size);
  // 13 bits of the mantissa are cut off: add as many random ones first.
  uint32_t normal = (bits + (random >> 19)) & ~0x1fffu;
  normal = normal > largest ? largest : normal;
  // Below 2^-14 the unit in the last place is 2^-24.
  const float share = size * 0x1p24f + static_cast<float>(static_cast<int32_t>(random >> 8)) * 0x1p-24f;
  const float tiny = static_cast<float>(static_cast<int32_t>(size < 0x1p-14f ? share : 0.0f)) * 0x1p-24f;
  uint32_t tiny_bits;
  std::memcpy(&tiny_bits, &tiny, sizeof tiny_bits);
  const uint32_t chosen = sign | (size < 0x1p-14f ? tiny_bits : normal);
  float result;
  std::memcpy(&result, &chosen, sizeof result);
  return result;
}

// The bits of a float that fp16 represents exactly.
inline uint16_t half_from_exact(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  float size = value < 0 ? -value : value;
  size *= 0x1p-112f;  // fp16 exponents, its subnormals as those of fp32
  uint32_t scaled;
  std::memcpy(&scaled, &size, sizeof scaled);
  return static_cast<uint16_t>(sign | (scaled >> 13));
}

// bf16 to nearest, ties to even; finite values.
inline uint16_t bfloat16_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace sfpk
