// What every selection kernel, host or device, agrees on: the integer image of a score, the bins of a
// histogram over it, and the tie rule. Coordinates are ranked by key falling, then by flat index rising.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace sfpk {

constexpr int32_t kNotCandidate = INT32_MIN;     // below the key of every score
constexpr int32_t kInfinityKey = 0x7f800000;     // of +inf; a larger key is a NaN
constexpr int32_t kLowestKey = -0x7f800000 - 1;  // of -inf; a smaller key is a NaN
constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;
constexpr float kGuessMargin =
    0.025f;  // how far around a guessed threshold, as a share of it, a cut is looked for

// The monotone image of a float's bits as a signed integer: a negative float's magnitude is flipped. That
// puts -0 on -1, just below +0 on 0; the two are equal scores, so -1 moves up to 0.
SFPK_HD inline int32_t key_from_bits(uint32_t bits) {
  const int32_t word = static_cast<int32_t>(bits);
  const int32_t key = word ^ ((word >> 31) & 0x7fffffff);
  return key + (key == -1 ? 1 : 0);
}

// The same for a score whose sign is dropped.
SFPK_HD inline int32_t key_from_magnitude(uint32_t bits) { return static_cast<int32_t>(bits & 0x7fffffffu); }

// The bits of the score a key stands for; +0 for both zeros.
SFPK_HD inline uint32_t bits_from_key(int32_t key) {
  return static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff));
}

SFPK_HD inline bool is_nan_key(int32_t key) { return key > kInfinityKey || key < kLowestKey; }

// How far keys of [low, high] are shifted so that they fall into kBins bins. A range of 2^32 takes shifts 21,
// 10 and 0 until a bin is a single key: digits of 11, 11 and 10 bits.
SFPK_HD inline int bin_shift(int32_t low, int32_t high) {
  uint32_t width = (static_cast<uint32_t>(high) - static_cast<uint32_t>(low)) >> kBinBits;
  int shift = 0;
  for (; width > 0; width >>= 1) ++shift;
  return shift;
}

// The bin of a key in [low, high]; keys outside give a bin ≥ kBins or a wrong one, so test the range first.
SFPK_HD inline uint32_t key_bin(int32_t key, int32_t low, int shift) {
  return (static_cast<uint32_t>(key) - static_cast<uint32_t>(low)) >> shift;
}

// The tie rule.
SFPK_HD inline bool is_kept(int32_t key, int64_t index, int32_t threshold, int64_t tie_end) {
  return key > threshold || (key == threshold && index < tie_end);
}

// A NaN of either sign comes out above every score: as a threshold it keeps nothing, and its key is never
// kNotCandidate, the one that a NaN of all ones would have.
SFPK_HD inline int32_t key_from_float(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  const uint32_t magnitude = bits & 0x7fffffffu;
  return key_from_bits(magnitude > static_cast<uint32_t>(kInfinityKey) ? magnitude : bits);
}

SFPK_HD inline float float_from_key(int32_t key) {
  const uint32_t bits = bits_from_key(key);
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

}  // namespace sfpk
