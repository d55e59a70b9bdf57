// csrc/cuda/approximate.cuh for the emulation: exact.
#pragma once

#include <cuda_runtime.h>

namespace prcl::cuda {

inline float approximate_reciprocal(float x) { return 1 / x; }
inline float approximate_exp2(float x) { return exp2f(x); }
inline float approximate_log2(float x) { return log2f(x); }

}  // namespace prcl::cuda
