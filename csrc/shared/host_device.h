// Marks functions that CPU code and CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define PRCL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PRCL_HOST_DEVICE inline __attribute__((always_inline))
#endif
