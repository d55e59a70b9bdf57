// Normal numbers on CUDA: one thread each.

#include "cuda/launch.h"
#include "shared/philox.h"

namespace prcl::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    normal_kernel(const int64_t* seed, uint32_t purpose, int64_t count, float* to) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) to[i] = philox::normal(philox::draw(seed, uint32_t(i), purpose));
}

Tensor philox_normal(Tensor seed, int64_t count, int64_t purpose) {
  const OnDeviceOf device(seed);
  Tensor result = empty_like_of(seed, {count}, ScalarType::Float);
  if (count == 0) return result;
  launch(normal_kernel, dim3(unsigned(ceil_div(count, kThreads))), dim3(kThreads), 0, device.stream(),
         seed.const_data_ptr<int64_t>(), uint32_t(purpose), count, result.mutable_data_ptr<float>());
  return result;
}

}  // namespace
}  // namespace prcl::cuda

PRCL_CUDA_LIBRARY(m) { m.impl("philox_normal", TORCH_BOX(&prcl::cuda::philox_normal)); }
