// Two-byte floats and fp32, both ways. Plain integer and float arithmetic: every compiler and instruction set
// gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace sfpk {

SFPK_HD inline float float_from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

// IEEE half to float by exponent arithmetic; exact, subnormals, infinities and NaN included.
SFPK_HD inline float float_from_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t shifted = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  const uint32_t special = (shifted & 0x0f800000u) == 0x0f800000u ? 0x70000000u : 0u;
  uint32_t wide = shifted + special;
  float value;
  memcpy(&value, &wide, sizeof value);
  value *= 0x1p112f;
  if (special) {
    wide = shifted | 0x7f800000u;
    memcpy(&value, &wide, sizeof value);
  }
  memcpy(&wide, &value, sizeof wide);
  wide |= sign;
  memcpy(&value, &wide, sizeof value);
  return value;
}

// fp32 to half, to nearest, ties to even; what is too large is an infinity, a NaN the quiet one.
SFPK_HD inline uint16_t half_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  // Below 2^-14 the sum with 1/2 rounds to the unit of subnormals, 2^-24.
  float tiny;
  memcpy(&tiny, &size, sizeof tiny);
  tiny += 0.5f;
  uint32_t tiny_bits;
  memcpy(&tiny_bits, &tiny, sizeof tiny_bits);
  const uint32_t normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  uint32_t half = size < 0x38800000u ? tiny_bits - 0x3f000000u : normal;
  half = size >= 0x47800000u ? 0x7c00u : half;
  half = size > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(sign | half);
}

// fp32 to bfloat16 in the same way.
SFPK_HD inline uint16_t bfloat16_from_float_or_nan(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace sfpk
