// Tensors as the CUDA bridges take them, checked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "checks.h"
#include "received.h"

namespace sfpk::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_device(const Tensor& t, const Tensor& first, const char* op, const char* name) {
  SFPK_CHECK(t.is_cuda() && t.get_device_index() == first.get_device_index(), op, name,
             "the device of the values", "another");
}

// The address of a contiguous tensor of `count` entries.
template <class T>
T* data_of(const Tensor& t, const Tensor& first, ScalarType type, int64_t count, const char* op,
           const char* name) {
  check_device(t, first, op, name);
  SFPK_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == count, op, name, count, t.numel(),
             " contiguous entries");
  return static_cast<T*>(t.data_ptr());
}

// A tensor whose rows have no gaps, (rows, count).
inline void check_rows(const Tensor& t, const Tensor& first, int64_t rows, int64_t count, const char* op,
                       const char* name) {
  check_device(t, first, op, name);
  SFPK_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == count && (count <= 1 || t.stride(1) == 1), op,
             name, "(rows, count) without gaps", "another tensor");
}

}  // namespace sfpk::cuda
