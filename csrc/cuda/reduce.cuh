// Sums over a warp, a block and a list of partial sums, each in an order that never changes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace prcl::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Every lane gets the sum.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Each part[r] summed over every group of `lanes` neighbouring lanes, a power of two of at least kRows; lane
// l gets the sum of row l % kRows.
template <int kRows>
__device__ __forceinline__ float warp_sums(float (&part)[kRows], int lanes = 32) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int step = 1; step < kRows; step *= 2) {
    const bool odd = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < kRows / (2 * step); ++i) {
      const float kept = odd ? part[2 * i + 1] : part[2 * i], sent = odd ? part[2 * i] : part[2 * i + 1];
      part[i] = kept + __shfl_xor_sync(kAllLanes, sent, step);
    }
  }
#pragma unroll
  for (int step = kRows; step < lanes; step *= 2) part[0] += __shfl_xor_sync(kAllLanes, part[0], step);
  return part[0];
}

// Every thread of the block, which has whole warps, gets the sum.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T of_warp[32];
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, warps = int(blockDim.x) / 32;
  value = warp_sum(value);
  __syncthreads();  // of_warp may still be read from an earlier call
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? of_warp[lane] : T(0));
}

constexpr int kSumThreads = 512;

// One block: sum[0] = the sum of all partial sums.
template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const T* partial, int64_t count, T* sum) {
  double mine = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) mine += double(partial[i]);
  const double all = block_sum(mine);
  if (threadIdx.x == 0) *sum = T(all);
}

}  // namespace prcl::cuda
