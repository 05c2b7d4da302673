// Bools and bits: entry e of a line is bit e % 8 of byte e // 8, on a little-endian machine also bit e % 32
// of word e // 32.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

namespace sfpk {

// Bit e of `out` is bools[e], zeros behind the last; `bytes` are written.
inline void pack_bits(const uint8_t* bools, int64_t count, uint8_t* out, int64_t bytes) {
  const int64_t whole = count / 8;
  for (int64_t byte = 0; byte < whole; ++byte) {
    uint64_t eight;
    std::memcpy(&eight, bools + 8 * byte, 8);
    out[byte] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
  for (int64_t byte = whole; byte < bytes; ++byte) {
    uint8_t bits = 0;
    for (int64_t e = 8 * byte; e < std::min(count, 8 * byte + 8); ++e)
      bits |= static_cast<uint8_t>(bools[e] << (e % 8));
    out[byte] = bits;
  }
}

// Bools of bits [begin, begin + count).
inline void unpack_bits(const uint8_t* bytes, int64_t begin, int64_t count, uint8_t* out) {
  static const std::array<uint64_t, 256> table = [] {
    std::array<uint64_t, 256> eights{};
    for (uint64_t byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit) eights[byte] |= (byte >> bit & 1) << (8 * bit);
    return eights;
  }();
  int64_t e = 0;
  for (; e < count && (begin + e) % 8 != 0; ++e) out[e] = bytes[(begin + e) / 8] >> ((begin + e) % 8) & 1;
  for (; e + 8 <= count; e += 8) std::memcpy(out + e, &table[bytes[(begin + e) / 8]], 8);
  for (; e < count; ++e) out[e] = bytes[(begin + e) / 8] >> ((begin + e) % 8) & 1;
}

}  // namespace sfpk
