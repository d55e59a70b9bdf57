// One instruction of the special function unit each, without the branches that nvcc's own functions take for
// denormal numbers: here those count as zero. Largest errors: reciprocal 1 ulp; exp2 2^-22 relative; log2
// 2^-22, absolute near one and relative elsewhere.
#pragma once

#include <cuda_runtime.h>

namespace prcl::cuda {

__device__ __forceinline__ float approximate_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float approximate_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float approximate_log2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace prcl::cuda
