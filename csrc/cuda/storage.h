// The types in which CUDA kernels read values: float32, bfloat16, float16.
#pragma once

#include "cuda/vector_load.cuh"
#include "shared/tensor.h"

namespace prcl::cuda {

// Calls f with a null pointer to the type.
template <class F>
void dispatch_storage(ScalarType type, const F& f) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "the CUDA kernels take float32, bfloat16 or float16");
  if (type == ScalarType::Float) return f(static_cast<float*>(nullptr));
  if (type == ScalarType::BFloat16) return f(static_cast<BFloat16*>(nullptr));
  f(static_cast<Half*>(nullptr));
}

// Calls f(Mu{}, Var{}) with the types of means and variances, those of dispatch_features but float64.
template <class F>
void dispatch_feature_storage(const Tensor& mu, const Tensor& var, const F& f) {
  dispatch_features(mu, var, [&](auto of_mu, auto of_var) {
    if constexpr (std::is_same_v<decltype(of_mu), double>) {
      STD_TORCH_CHECK(false, "the CUDA kernels take float32, bfloat16 or float16");
    } else {
      f(of_mu, of_var);
    }
  });
}

}  // namespace prcl::cuda
