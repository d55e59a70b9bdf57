// The host side of every CUDA op: the tensor's device, PyTorch's current stream on it, checked launches and
// the registration of kernels. Nothing else in the CUDA sources knows how a kernel is launched.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "shared/tensor.h"

#define PRCL_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CUDA, m)

namespace prcl::cuda {

// Throws where a call of the CUDA runtime failed. The runtime is our own, linked statically: its last error
// has to be taken here, or the next launch would report it once more.
inline void check(cudaError_t status) {
  if (status != cudaSuccess) (void)cudaGetLastError();
  STD_CUDA_CHECK(status);
}

// Makes `tensor`'s device current for its own lifetime.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// A launch may use 48 KiB of shared memory, static and dynamic together, unless its kernel was allowed more.
// It is allowed all that the device has, whatever this launch needs: other threads may be launching it as
// well.
template <class... Parameters>
void allow_shared_memory(void (*kernel)(Parameters...), size_t dynamic_bytes) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
  if (attributes.sharedSizeBytes + dynamic_bytes <= kWithoutAsking) return;
  int device = 0, most = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - int(attributes.sharedSizeBytes)));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            cudaStream_t stream, Arguments... arguments) {
  if (dynamic_shared_bytes > 0) allow_shared_memory(kernel, dynamic_shared_bytes);
  kernel<<<grid, block, dynamic_shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError());
}

// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ uint4 prcl_dynamic_shared[];
  return reinterpret_cast<T*>(prcl_dynamic_shared);
}

}  // namespace prcl::cuda
