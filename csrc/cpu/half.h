// Two-byte floats and fp32, both ways. Plain integer and float arithmetic: every compiler and instruction set
// gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace sfpk {

inline float float_from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// IEEE half to float by exponent arithmetic; exact, subnormals, infinities and NaN included.
inline float float_from_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t shifted = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  const uint32_t special = (shifted & 0x0f800000u) == 0x0f800000u ? 0x70000000u : 0u;
  uint32_t wide = shifted + special;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  value *= 0x1p112f;
  if (special) {
    wide = shifted | 0x7f800000u;
    std::memcpy(&value, &wide, sizeof value);
  }
  std::memcpy(&wide, &value, sizeof wide);
  wide |= sign;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

}  // namespace sfpk
