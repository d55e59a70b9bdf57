// Anchors on CUDA: one thread a draw from the class lists of the hard pixels. Rules:
// prcl_fast/reference/sample_anchors.py.

#include "cuda/launch.h"
#include "shared/philox.h"

namespace prcl::cuda {
namespace {

constexpr int kThreads = 128;  // draws are few: small blocks reach more multiprocessors

__global__ void __launch_bounds__(kThreads)
    draw_anchors_kernel(const int* order, const int* start, const int64_t* seed, int64_t draws,
                        int64_t num_anchors, int64_t* index) {
  const int64_t element = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= draws) return;
  const uint32_t c = uint32_t(element) / uint32_t(num_anchors);
  const int first = start[c], count = start[c + 1] - first;
  const philox::Words words = philox::draw(seed, uint32_t(element), philox::kAnchors);
  index[element] = count > 0 ? order[first + philox::bounded(words.w0, words.w1, count)] : -1;
}

Tensor sample_anchors(Tensor order, Tensor start, int64_t num_anchors, Tensor seed) {
  const OnDeviceOf device(order);
  const int64_t num_classes = start.numel() - 1;
  Tensor index = empty_like_of(order, {num_classes, num_anchors}, ScalarType::Long);
  const int64_t draws = num_classes * num_anchors;
  launch(draw_anchors_kernel, dim3(unsigned(ceil_div(draws, kThreads))), dim3(kThreads), 0, device.stream(),
         order.const_data_ptr<int32_t>(), start.const_data_ptr<int32_t>(), seed.const_data_ptr<int64_t>(),
         draws, num_anchors, index.mutable_data_ptr<int64_t>());
  return index;
}

}  // namespace
}  // namespace prcl::cuda

PRCL_CUDA_LIBRARY(m) { m.impl("sample_anchors", TORCH_BOX(&prcl::cuda::sample_anchors)); }
