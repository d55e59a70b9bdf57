// Negatives on CUDA: draws from the class lists of the valid pixels. Rules:
// prcl_fast/reference/sample_negatives.py.
//
// A block draws for one class of anchors. Its first warp sums that class's row of integer weights; the row's
// sums and all lists' starts stay in shared memory. A thread then takes every gridDim.x * kThreads-th draw:
// Philox, a binary search in the row for the class, and one read of the list for the pixel. Draws of a warp
// are neighbours in the output.

#include "cuda/launch.h"
#include "shared/philox.h"

#include <algorithm>

namespace prcl::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFF;
constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;

// sums[k] = min(weight[0] + ... + weight[k], 2^31), where class `self` and classes without a pixel weigh
// nothing, and more than any draw for C <= k < padded; by one warp.
__device__ __forceinline__ void sum_weights(const double* probability, const int* start, int classes,
                                            int padded, int self, uint32_t* sums) {
  const int lane = threadIdx.x;
  int64_t sum = 0;
  for (int base = 0; base < padded; base += 32) {
    const int k = base + lane;
    const bool drawable = k < classes && k != self && start[k + 1] > start[k];
    int64_t up_to = drawable ? philox::weight(probability[k]) : 0;
#pragma unroll
    for (int reach = 1; reach < 32; reach *= 2) {
      const int64_t below = __shfl_up_sync(kAll, up_to, reach);
      if (lane >= reach) up_to += below;
    }
    const int64_t cut = min(sum + up_to, philox::kOne);
    if (k < padded) sums[k] = k < classes ? uint32_t(cut) : UINT32_MAX;
    sum = __shfl_sync(kAll, cut, 31);
  }
}

__global__ void __launch_bounds__(kThreads)
    draw_negatives_kernel(const double* class_probability, const int* order, const int* list_start,
                          const int64_t* seed, int classes, int padded, int64_t draws_per_class,
                          int64_t* index) {
  int* const start = dynamic_shared<int>();                                 // [C + 1]
  uint32_t* const sums = reinterpret_cast<uint32_t*>(start + classes + 1);  // [padded]
  const int c = blockIdx.y;
  for (int k = threadIdx.x; k <= classes; k += kThreads) start[k] = list_start[k];
  __syncthreads();
  if (threadIdx.x < 32) {
    sum_weights(class_probability + int64_t(c) * classes, start, classes, padded, c, sums);
  }
  __syncthreads();

  const uint32_t total = sums[classes - 1];
  const int64_t own_seed[2] = {seed[0], seed[1]};  // in registers: stores to `index` could change `seed`
  const int64_t base = c * draws_per_class, step = int64_t(gridDim.x) * kThreads;
#pragma unroll 2
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < draws_per_class; i += step) {
    int64_t pixel = -1;
    if (total > 0) {
      const philox::Words words = philox::draw(own_seed, uint32_t(base + i), philox::kNegatives);
      const uint32_t x = uint32_t(philox::bounded(words.w0, words.w1, total));
      unsigned k = 0;  // how many sums are not above x: fewer than C, since x is below the last one
      for (unsigned reach = unsigned(padded) / 2; reach > 0; reach /= 2)
        k += sums[k + reach - 1] <= x ? reach : 0;
      const int first = start[k], count = start[k + 1] - first;
      pixel = __ldg(order + first + philox::bounded(words.w2, words.w3, count));
    }
    index[base + i] = pixel;
  }
}

Tensor sample_negatives(Tensor class_probability, Tensor order, Tensor start, int64_t num_anchors,
                        int64_t num_negatives, Tensor seed) {
  const OnDeviceOf device(order);
  const int64_t classes = class_probability.size(0), draws_per_class = num_anchors * num_negatives;
  Tensor index = empty_like_of(order, {classes, num_anchors, num_negatives}, ScalarType::Long);
  const int64_t resident = kBlocksPerMultiprocessor * int64_t(device.multiprocessors());
  const int64_t blocks =
      std::min(ceil_div(draws_per_class, kThreads), std::max<int64_t>(1, resident / classes));
  int64_t padded = 1;  // the power of two at which the search of the class starts
  while (padded < classes) padded *= 2;
  launch(draw_negatives_kernel, dim3(unsigned(blocks), unsigned(classes)), dim3(kThreads),
         (classes + 1 + padded) * sizeof(int), device.stream(), class_probability.const_data_ptr<double>(),
         order.const_data_ptr<int32_t>(), start.const_data_ptr<int32_t>(), seed.const_data_ptr<int64_t>(),
         int(classes), int(padded), draws_per_class, index.mutable_data_ptr<int64_t>());
  return index;
}

}  // namespace
}  // namespace prcl::cuda

PRCL_CUDA_LIBRARY(m) { m.impl("sample_negatives", TORCH_BOX(&prcl::cuda::sample_negatives)); }
