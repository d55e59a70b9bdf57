// Says why this library's kernels cannot run on the current device: a driver too old for the CUDA runtime
// linked in, or no code for the device's architecture. Asked once, after loading, so that no op has to find
// out by failing.

#include <cuda_runtime.h>

#include <torch/csrc/stable/library.h>

#include <string>

namespace prcl::cuda {
namespace {

__global__ void probe_kernel() {}

std::string cuda_error() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // PyTorch must not find this error later
  return cudaGetErrorString(error);
}

}  // namespace
}  // namespace prcl::cuda

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_error", TORCH_BOX(&prcl::cuda::cuda_error));
}
