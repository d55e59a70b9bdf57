// Small helpers over PyTorch's stable tensors, for the host side of every op.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>
#include <vector>

namespace prcl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// On `like`'s device, of its dtype unless another one is given.
inline Tensor empty_like_of(const Tensor& like, std::initializer_list<int64_t> size,
                            std::optional<ScalarType> dtype = std::nullopt) {
  const std::vector<int64_t> sizes(size);
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()),
                                  dtype);
}

// A map [B, C, height, width] with the batch, channels, dtype and device of the map `like`.
inline Tensor map_like(const Tensor& like, int64_t height, int64_t width, bool channels_last) {
  const int64_t size[] = {like.size(0), like.size(1), height, width};
  return torch::stable::empty({size, 4}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                            : torch::headeronly::MemoryFormat::Contiguous);
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

// The type in which values of type S are computed.
template <class S>
using Work = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S>
constexpr ScalarType kWorkType = std::is_same_v<S, double> ? ScalarType::Double : ScalarType::Float;

// Calls f(S{}) with the tensor's floating-point type.
template <class F>
void dispatch_floating(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    case ScalarType::Double:
      return f(double{});
    default:
      STD_TORCH_CHECK(false, "expected a float32, bfloat16, float16 or float64 tensor");
  }
}

// Calls f(Mu{}, Var{}) with the types of means and variances: one type for both, or 16-bit means beside
// float32 variances, which is what heads under autocast make.
template <class F>
void dispatch_features(const Tensor& mu, const Tensor& var, const F& f) {
  dispatch_floating(mu, [&](auto zero) {
    if (var.scalar_type() == mu.scalar_type()) return f(zero, zero);
    if constexpr (sizeof(zero) == 2) {
      if (var.scalar_type() == ScalarType::Float) return f(zero, float{});
    }
    STD_TORCH_CHECK(false, "expected variances of the means' type, or float32 ones beside 16-bit means");
  });
}

// Calls f(S{}, O{}) with the tensor's floating-point type and `other`, which is its work type or the same.
template <class F>
void dispatch_floating_with(const Tensor& tensor, ScalarType other, const F& f) {
  dispatch_floating(tensor, [&](auto zero) {
    using S = decltype(zero);
    if (other == kWorkType<S>) return f(zero, Work<S>{});
    STD_TORCH_CHECK(other == tensor.scalar_type(), "expected the tensor's own type or its work type");
    f(zero, zero);
  });
}

}  // namespace prcl
