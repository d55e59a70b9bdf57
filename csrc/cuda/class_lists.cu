// Class lists by a stable counting sort in two launches, without a float or an ordering by arrival: the
// result depends on the labels alone.
//
// Every block owns one range of pixels, cut into tiles; in a tile a warp owns kPerLane * 32 pixels, a lane
// every 32nd of them, so that position order is (warp, step, lane). The first kernel counts each range's
// pixels per class, [C, ranges]. In the second each block sums that table again, which gives where its own
// pixels of each class go, and then places tile after tile: a pixel's rank in its warp comes from matching
// classes within the warp and a running count in shared memory, its warp's place from a sum over the warps.
// Labels are read twice, the list is written once.

#include "cuda/class_lists.h"

#include <algorithm>

namespace prcl::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFF;
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kPerLane = 8;
constexpr int kTile = kThreads * kPerLane;
constexpr int kRangesPerMultiprocessor = 2;
constexpr int64_t kMaxClasses = 4096;  // (kWarps + 1) counters of each in shared memory

template <class L>
struct Pixels {
  const L* label;
  const bool* keep;
  const bool* also_keep;  // or null
  int64_t count;
  int classes;
};

// The classes of pixels first + 32 * i + lane; -1 for those that do not belong to any.
template <class L>
__device__ __forceinline__ void read_classes(const Pixels<L>& pixels, int64_t first, int (&of)[kPerLane]) {
  int64_t label[kPerLane];
  bool kept[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t pixel = first + 32 * i + threadIdx.x % 32;
    const bool inside = pixel < pixels.count;
    label[i] = inside ? int64_t(pixels.label[pixel]) : -1;
    kept[i] = inside && pixels.keep[pixel];
    if (inside && pixels.also_keep != nullptr) kept[i] &= pixels.also_keep[pixel];
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    of[i] = kept[i] && label[i] >= 0 && label[i] < pixels.classes ? int(label[i]) : -1;
  }
}

template <class L>
__global__ void __launch_bounds__(kThreads)
    count_kernel(Pixels<L> pixels, int tiles_per_range, int* histogram) {
  int* const counts = dynamic_shared<int>();  // [C]
  for (int c = threadIdx.x; c < pixels.classes; c += kThreads) counts[c] = 0;
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int tile = 0; tile < tiles_per_range; ++tile) {
    const int64_t first = (int64_t(blockIdx.x) * tiles_per_range + tile) * kTile + warp * (kTile / kWarps);
    if (first >= pixels.count) break;
    int of[kPerLane];
    read_classes(pixels, first, of);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const unsigned peers = __match_any_sync(kAll, of[i]);
      if (of[i] >= 0 && lane == __ffs(int(peers)) - 1) atomicAdd(&counts[of[i]], __popc(peers));
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < pixels.classes; c += kThreads) {
    histogram[int64_t(c) * gridDim.x + blockIdx.x] = counts[c];
  }
}

// Sets next[c] to the place in the list of this block's first pixel of class c; block 0 writes all starts.
// `totals` is shared scratch of C values.
__device__ __forceinline__ void find_places(const int* histogram, int classes, int* totals, int* next,
                                            int* start) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, ranges = gridDim.x;
  for (int c = warp; c < classes; c += kWarps) {
    int total = 0, before = 0;
#pragma unroll 8
    for (int range = lane; range < ranges; range += 32) {
      const int n = histogram[int64_t(c) * ranges + range];
      total += n;
      before += range < int(blockIdx.x) ? n : 0;
    }
    total = __reduce_add_sync(kAll, total);
    before = __reduce_add_sync(kAll, before);
    if (lane == 0) {
      totals[c] = total;
      next[c] = before;
    }
  }
  __syncthreads();
  if (warp == 0) {
    int sum = 0;
    for (int first = 0; first < classes; first += 32) {
      const int c = first + lane, n = c < classes ? totals[c] : 0;
      int up_to = n;
#pragma unroll
      for (int reach = 1; reach < 32; reach *= 2) {
        const int below = __shfl_up_sync(kAll, up_to, reach);
        if (lane >= reach) up_to += below;
      }
      if (c < classes) {
        next[c] += sum + up_to - n;
        if (blockIdx.x == 0) start[c] = sum + up_to - n;
      }
      sum += __shfl_sync(kAll, up_to, 31);
    }
    if (blockIdx.x == 0 && lane == 0) start[classes] = sum;
  }
  __syncthreads();
}

template <class L>
__global__ void __launch_bounds__(kThreads)
    place_kernel(Pixels<L> pixels, int tiles_per_range, const int* histogram, int* order, int* start) {
  const int classes = pixels.classes, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int* const next = dynamic_shared<int>();  // [C]
  int* const counts = next + classes;       // [warps, C]
  int* const mine = counts + warp * classes;
  find_places(histogram, classes, counts, next, start);
  for (int tile = 0; tile < tiles_per_range; ++tile) {
    const int64_t tile_first = (int64_t(blockIdx.x) * tiles_per_range + tile) * kTile;
    if (tile_first >= pixels.count) break;
    const int64_t first = tile_first + warp * (kTile / kWarps);
    for (int c = lane; c < classes; c += 32) mine[c] = 0;
    __syncwarp();
    int of[kPerLane], rank[kPerLane];
    read_classes(pixels, first, of);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const unsigned peers = __match_any_sync(kAll, of[i]), below = peers & ((1u << lane) - 1);
      rank[i] = of[i] < 0 ? 0 : mine[of[i]] + __popc(below);
      __syncwarp();
      if (of[i] >= 0 && below == 0) mine[of[i]] += __popc(peers);
      __syncwarp();
    }
    __syncthreads();
    for (int c = threadIdx.x; c < classes; c += kThreads) {
      int at = next[c];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const int n = counts[w * classes + c];
        counts[w * classes + c] = at;
        at += n;
      }
      next[c] = at;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (of[i] >= 0) order[mine[of[i]] + rank[i]] = int(first + 32 * i + lane);
    }
    __syncwarp();
  }
}

template <class L>
ClassLists sort(const OnDeviceOf& device, const Tensor& label, const Tensor& keep, const Tensor* also_keep,
                int classes) {
  const Pixels<L> pixels{static_cast<const L*>(label.const_data_ptr()), keep.const_data_ptr<bool>(),
                         also_keep == nullptr ? nullptr : also_keep->const_data_ptr<bool>(), label.numel(),
                         classes};
  const int64_t tiles = std::max<int64_t>(1, ceil_div(pixels.count, kTile));
  const int64_t tiles_per_range = ceil_div(tiles, kRangesPerMultiprocessor * device.multiprocessors());
  const dim3 ranges(unsigned(ceil_div(tiles, tiles_per_range)));
  Tensor histogram = empty_like_of(label, {classes, ranges.x}, ScalarType::Int);
  ClassLists lists{empty_like_of(label, {pixels.count}, ScalarType::Int),
                   empty_like_of(label, {classes + 1}, ScalarType::Int)};
  launch(count_kernel<L>, ranges, dim3(kThreads), classes * sizeof(int), device.stream(), pixels,
         int(tiles_per_range), histogram.mutable_data_ptr<int32_t>());
  launch(place_kernel<L>, ranges, dim3(kThreads), (kWarps + 1) * classes * sizeof(int), device.stream(),
         pixels, int(tiles_per_range), histogram.const_data_ptr<int32_t>(),
         lists.order.mutable_data_ptr<int32_t>(), lists.start.mutable_data_ptr<int32_t>());
  return lists;
}

}  // namespace

ClassLists class_lists(const OnDeviceOf& device, const Tensor& label, const Tensor& keep,
                       const Tensor* also_keep, int64_t num_classes) {
  STD_TORCH_CHECK(num_classes <= kMaxClasses, "num_classes must be at most ", kMaxClasses, " on CUDA; got ",
                  num_classes);
  const int classes = int(num_classes);
  switch (label.scalar_type()) {
    case ScalarType::Byte:
      return sort<uint8_t>(device, label, keep, also_keep, classes);
    case ScalarType::Char:
      return sort<int8_t>(device, label, keep, also_keep, classes);
    case ScalarType::Short:
      return sort<int16_t>(device, label, keep, also_keep, classes);
    case ScalarType::Int:
      return sort<int32_t>(device, label, keep, also_keep, classes);
    default:
      return sort<int64_t>(device, label, keep, also_keep, classes);
  }
}

}  // namespace prcl::cuda
