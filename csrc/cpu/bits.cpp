// pack_, unpack_, popcount_, overlaps_: bit-packed masks on the CPU.
#include "bits.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <mutex>
#include <vector>

#include "checks.h"
#include "integers.h"
#include "isa.h"

namespace {

using sfpk::ceil_div;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBytes = 1 << 14;  // of a row that a thread takes at a time

// Lines of `d` bools beside their packed lines of `bytes`.
struct Lines {
  int64_t lines, d, bytes;
};

Lines lines_of(const Tensor& bools, const Tensor& packed, const char* op) {
  SFPK_CHECK(bools.scalar_type() == ScalarType::Bool && bools.is_contiguous(), op, "mask", "contiguous bools",
             "another tensor");
  SFPK_CHECK((packed.scalar_type() == ScalarType::Byte || packed.scalar_type() == ScalarType::Int) &&
                 packed.is_contiguous() && packed.dim() >= 1,
             op, "packed", "contiguous uint8 or int32", "another tensor");
  const int64_t unit = 8 * static_cast<int64_t>(packed.element_size());
  const int64_t d = bools.dim() ? bools.size(bools.dim() - 1) : 1;
  const int64_t lines = d ? bools.numel() / d : 0;
  SFPK_CHECK(packed.numel() == lines * ceil_div(d, unit), op, "packed", lines * ceil_div(d, unit),
             packed.numel(), " entries");
  return {lines, d, ceil_div(d, unit) * unit / 8};
}

// f(line, first bit, bits, bytes written): lines in parts of kBytes.
template <class F>
void for_parts(const Lines& all, const F& f) {
  const int64_t parts = ceil_div(all.bytes, kBytes);
  const int64_t grain =
      std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, 8 * std::min(all.bytes, kBytes)));
  torch::stable::parallel_for(0, all.lines * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % parts * kBytes, bytes = std::min(kBytes, all.bytes - first);
      f(i / parts, 8 * first, std::max<int64_t>(0, std::min(8 * bytes, all.d - 8 * first)), bytes);
    }
  });
}

void pack_(const Tensor& mask, Tensor out) {
  const Lines all = lines_of(mask, out, "pack_");
  const auto* bools = static_cast<const uint8_t*>(mask.const_data_ptr());
  auto* packed = static_cast<uint8_t*>(out.mutable_data_ptr());
  for_parts(all, [&](int64_t line, int64_t first, int64_t count, int64_t bytes) {
    sfpk::pack_bits(bools + line * all.d + first, count, packed + line * all.bytes + first / 8, bytes);
  });
}

void unpack_(const Tensor& packed, Tensor out) {
  const Lines all = lines_of(out, packed, "unpack_");
  const auto* bytes = static_cast<const uint8_t*>(packed.const_data_ptr());
  auto* bools = static_cast<uint8_t*>(out.mutable_data_ptr());
  for_parts(all, [&](int64_t line, int64_t first, int64_t count, int64_t) {
    sfpk::unpack_bits(bytes + line * all.bytes, first, count, bools + line * all.d + first);
  });
}

// Bits set in both of two rows; inlined where the instruction set is known.
[[gnu::always_inline]] inline int64_t overlap(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  int64_t total = 0, at = 0;
  for (; at + 8 <= bytes; at += 8) {
    uint64_t x, y;
    std::memcpy(&x, a + at, 8);
    std::memcpy(&y, b + at, 8);
    total += __builtin_popcountll(x & y);
  }
  for (; at < bytes; ++at) total += __builtin_popcount(a[at] & b[at]);
  return total;
}

int64_t overlap_anywhere(const uint8_t* a, const uint8_t* b, int64_t bytes) { return overlap(a, b, bytes); }

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("popcnt")
int64_t overlap_popcnt(const uint8_t* a, const uint8_t* b, int64_t bytes) { return overlap(a, b, bytes); }
#pragma GCC pop_options
#endif

using Overlap = int64_t (*)(const uint8_t*, const uint8_t*, int64_t);

Overlap overlap_here() {
#if defined(__x86_64__)
  if (sfpk::cpu_isa() != sfpk::Isa::kBaseline) return overlap_popcnt;
#endif
  return overlap_anywhere;
}

struct Rows {
  const uint8_t* data;
  int64_t n, bytes;
};

Rows rows_of(const Tensor& t, const char* op, const char* name) {
  SFPK_CHECK((t.scalar_type() == ScalarType::Byte || t.scalar_type() == ScalarType::Int) && t.dim() == 2 &&
                 t.is_contiguous(),
             op, name, "contiguous uint8 or int32 (n, units)", "another tensor");
  return {static_cast<const uint8_t*>(t.const_data_ptr()), t.size(0),
          t.size(1) * static_cast<int64_t>(t.element_size())};
}

int64_t* counts_of(Tensor& out, int64_t count, const char* op) {
  SFPK_CHECK(out.scalar_type() == ScalarType::Long && out.is_contiguous() && out.numel() == count, op, "out",
             count, out.numel(), " int64 counts");
  auto* counts = static_cast<int64_t*>(out.mutable_data_ptr());
  std::fill_n(counts, count, 0);
  return counts;
}

// Sums f(first byte, bytes, part of the totals) over the parts of a row; integers, so in any order.
template <class F>
void sum_over_parts(int64_t bytes, int64_t count, int64_t* totals, const F& f) {
  std::mutex mutex;
  torch::stable::parallel_for(0, ceil_div(bytes, kBytes), 4, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> partial(static_cast<size_t>(count));
    for (int64_t part = begin; part < end; ++part)
      f(part * kBytes, std::min(kBytes, bytes - part * kBytes), partial.data());
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t i = 0; i < count; ++i) totals[i] += partial[i];
  });
}

void popcount_(const Tensor& packed, Tensor out) {
  const Rows rows = rows_of(packed, "popcount_", "packed");
  int64_t* totals = counts_of(out, rows.n, "popcount_");
  const Overlap count = overlap_here();
  sum_over_parts(rows.bytes, rows.n, totals, [&](int64_t first, int64_t bytes, int64_t* partial) {
    for (int64_t i = 0; i < rows.n; ++i) {
      const uint8_t* row = rows.data + i * rows.bytes + first;
      partial[i] += count(row, row, bytes);
    }
  });
}

void overlaps_(const Tensor& a, const Tensor& b, Tensor out) {
  const Rows left = rows_of(a, "overlaps_", "a"), right = rows_of(b, "overlaps_", "b");
  SFPK_CHECK(left.bytes == right.bytes, "overlaps_", "b", left.bytes, right.bytes, " bytes a row");
  int64_t* totals = counts_of(out, left.n * right.n, "overlaps_");
  const Overlap count = overlap_here();
  sum_over_parts(left.bytes, left.n * right.n, totals, [&](int64_t first, int64_t bytes, int64_t* partial) {
    for (int64_t i = 0; i < left.n; ++i)
      for (int64_t j = 0; j < right.n; ++j)
        partial[i * right.n + j] +=
            count(left.data + i * left.bytes + first, right.data + j * right.bytes + first, bytes);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfpk_cpp, CPU, m) {
  m.impl("pack_", TORCH_BOX(&pack_));
  m.impl("unpack_", TORCH_BOX(&unpack_));
  m.impl("popcount_", TORCH_BOX(&popcount_));
  m.impl("overlaps_", TORCH_BOX(&overlaps_));
}
