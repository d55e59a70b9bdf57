// The types in which CUDA kernels read values: float32, bfloat16, float16.
#pragma once

#include "cuda/vector_load.cuh"
#include "tensor.h"

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

}  // namespace prcl::cuda
