// Kernels that test the emulation itself.

#include "cuda/launch.h"

#include <string>

namespace prcl::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFF;

// The first half of the threads ends, where `option` is 1, or waits at another barrier than the second.
__global__ void divergent_kernel(const int64_t*, int64_t*, int64_t option) {
  if (threadIdx.x >= blockDim.x / 2) {
    __syncthreads();
  } else if (option == 0) {
    __syncthreads();
  }
}

// Lane 0 stays away from a shuffle that names it.
__global__ void absent_lane_kernel(const int64_t*, int64_t* out, int64_t) {
  if (threadIdx.x != 0) out[threadIdx.x] = __shfl_sync(kAll, int(threadIdx.x), 0);
  __syncthreads();
}

// out [9, threads]: what each thread gets from each collective for its own value.
__global__ void collectives_kernel(const int64_t* in, int64_t* out, int64_t) {
  const int n = blockDim.x, i = threadIdx.x;
  const int64_t value = in[i];
  out[0 * n + i] = __shfl_sync(kAll, value, 5);
  out[1 * n + i] = __shfl_up_sync(kAll, value, 3);
  out[2 * n + i] = __shfl_down_sync(kAll, value, 3);
  out[3 * n + i] = __shfl_xor_sync(kAll, value, 16);
  out[4 * n + i] = __shfl_down_sync(kAll, value, 1, 8);
  out[5 * n + i] = __ballot_sync(kAll, value > 2);
  out[6 * n + i] = __match_any_sync(kAll, value);
  out[7 * n + i] = __reduce_add_sync(kAll, int(value));
  out[8 * n + i] = __syncthreads_count(value > 2);
}

// Running sums of each block's first `live` values through shared memory; the other threads end at once.
__global__ void scan_kernel(const int64_t* in, int64_t* out, int64_t live) {
  __shared__ int64_t sums[1024];
  int64_t* const copy = dynamic_shared<int64_t>();
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  out[at] = 0;
  if (threadIdx.x >= live) return;
  copy[threadIdx.x] = in[at];
  for (int reach = 1; reach < live; reach *= 2) {
    __syncthreads();
    const int from = int(threadIdx.x) - reach;
    sums[threadIdx.x] = copy[threadIdx.x] + (from >= 0 ? copy[from] : 0);
    __syncthreads();
    copy[threadIdx.x] = sums[threadIdx.x];
  }
  out[at] = copy[threadIdx.x];
}

// Reads what the neighbour `option` threads away writes, without a barrier.
__global__ void race_kernel(const int64_t* in, int64_t* out, int64_t option) {
  int64_t* const copy = dynamic_shared<int64_t>();
  const int n = blockDim.x, i = threadIdx.x;
  copy[i] = in[i];
  out[blockIdx.x * n + i] = copy[(i + n + option) % n];
}

// What a block finds in dynamic shared memory before it writes there.
__global__ void fresh_memory_kernel(const int64_t*, int64_t* out, int64_t) {
  int64_t* const shared = dynamic_shared<int64_t>();
  out[int64_t(blockIdx.x) * blockDim.x + threadIdx.x] = shared[threadIdx.x];
  shared[threadIdx.x] = 1;
}

Tensor run(Tensor in, std::string name, int64_t blocks, int64_t threads, int64_t option) {
  const OnDeviceOf device(in);
  Tensor out = empty_like_of(in, {name == "collectives" ? 9 : blocks, threads});
  const auto kernel = name == "divergent"     ? divergent_kernel
                      : name == "absent_lane" ? absent_lane_kernel
                      : name == "collectives" ? collectives_kernel
                      : name == "scan"        ? scan_kernel
                      : name == "race"        ? race_kernel
                                              : fresh_memory_kernel;
  launch(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), threads * sizeof(int64_t), device.stream(),
         in.const_data_ptr<int64_t>(), out.mutable_data_ptr<int64_t>(), option);
  return out;
}

}  // namespace
}  // namespace prcl::cuda

STABLE_TORCH_LIBRARY(prcl_fast_emulation_test, m) {
  m.def("run(Tensor input, str kernel, int blocks, int threads, int option) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_emulation_test, CPU, m) { m.impl("run", TORCH_BOX(&prcl::cuda::run)); }
