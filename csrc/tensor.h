// Small helpers over PyTorch's stable tensors, for the host side of every op.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace prcl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty_like_of(const Tensor& like, std::initializer_list<int64_t> size) {
  const std::vector<int64_t> sizes(size);
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(T{}) with the tensor's type, float or double; the Python side has cast everything else.
template <class F>
void dispatch_float_or_double(const Tensor& tensor, const F& f) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "expected a float32 or float64 tensor");
  if (type == ScalarType::Double) return f(double{});
  f(float{});
}

}  // namespace prcl
