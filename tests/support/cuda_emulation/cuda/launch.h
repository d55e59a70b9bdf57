// csrc/cuda/launch.h for the emulation: the same names, on CPU tensors.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "shared/tensor.h"

#define PRCL_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(prcl_fast_emulated, CPU, m)

namespace prcl::cuda {

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  int multiprocessors() const { return 3; }
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared_bytes, cudaStream_t,
            Arguments... arguments) {
  emulation::run_grid(grid, block, dynamic_shared_bytes, [&] { kernel(arguments...); });
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::dynamic_shared);
}

}  // namespace prcl::cuda
