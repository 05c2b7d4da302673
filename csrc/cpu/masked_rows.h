// What θ ⊙ mask and its derivative share on the CPU: rows of tensors, and tiles shared out among threads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "codes.h"
#include "layout.h"
#include "received.h"

namespace sfpk {

// Rows of (…, count) values beside each other; `data` is a char* or const char*.
template <class Data>
struct Rows {
  Data data;
  FloatKind kind;
  int64_t row_bytes;
  Data at(int64_t row, int64_t entry) const { return data + row * row_bytes + entry * bytes_of(kind); }
};

// The rows of a tensor (n, count) whose entries have no gaps; with const char* they are only read.
template <class Data>
Rows<Data> rows_of(const torch::stable::Tensor& t, int64_t n, int64_t count, const char* op,
                   const char* name) {
  SFPK_CHECK(t.dim() == 2 && t.size(0) == n && t.size(1) == count && (count <= 1 || t.stride(1) == 1), op,
             name, "(rows, weights of the piece) without gaps", "another tensor");
  const FloatKind kind = kind_of(t, op, name);
  Data data;
  if constexpr (std::is_same_v<Data, const char*>)
    data = static_cast<Data>(t.const_data_ptr());
  else
    data = static_cast<Data>(t.mutable_data_ptr());
  return {data, kind, t.stride(0) * bytes_of(kind)};
}

// f(piece, first weight, weights) over tiles of all pieces, shared out among the threads.
void for_tiles(const std::vector<Piece>& pieces, const std::function<void(size_t, int64_t, int64_t)>& f);

}  // namespace sfpk
