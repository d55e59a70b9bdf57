// Class lists by a stable counting sort in two launches, without a float or an ordering by arrival: the
// result depends on the labels alone. The lists of the valid pixels and of the hard ones among them are made
// together: labels are read twice, each list is written once.
//
// Every block owns one range of pixels, cut into tiles; in a tile a warp owns kPerLane * 32 pixels, a lane
// every 32nd of them, so that position order is (warp, step, lane). The first kernel counts each range's
// pixels per class, [2, C, ranges]. In the second each block sums that table again, which gives where its own
// pixels of each class go, and then places tile after tile: a pixel's rank in its warp comes from matching
// classes within the warp and a running count in shared memory, its warp's place from a sum over the warps.
// Within a tile two counts fit into one word, the valid pixels' below the hard ones'.

#include "cuda/class_lists.h"

#include <algorithm>
#include <tuple>

namespace prcl::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFF;
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kPerLane = 8;
constexpr int kTile = kThreads * kPerLane;
constexpr int kRangesPerMultiprocessor = 2;
constexpr int64_t kMaxClasses = 4096;  // (kWarps + 2) counters of each in shared memory

constexpr unsigned kHardShift = 16, kValidMask = 0xFFFF;
static_assert(kTile <= int(kValidMask), "a tile's counts fit into half a word");

template <class L>
struct Pixels {
  const L* label;
  const bool *valid, *hard;
  int64_t count;
  int classes;
};

// The classes of pixels first + 32 * i + lane, -1 for those that do not belong to any; bit i of `hard` says
// whether the pixel is hard.
template <class L>
__device__ __forceinline__ void read_classes(const Pixels<L>& pixels, int64_t first, int (&of)[kPerLane],
                                             unsigned& hard) {
  int64_t label[kPerLane];
  bool valid[kPerLane];
  hard = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t pixel = first + 32 * i + threadIdx.x % 32;
    const bool inside = pixel < pixels.count;
    label[i] = inside ? int64_t(pixels.label[pixel]) : -1;
    valid[i] = inside && pixels.valid[pixel];
    hard |= unsigned(inside && pixels.hard[pixel]) << i;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    of[i] = valid[i] && label[i] >= 0 && label[i] < pixels.classes ? int(label[i]) : -1;
  }
}

// The lanes of `lanes` and, above kHardShift, those of them that are hard: how many they are.
__device__ __forceinline__ unsigned both_counts(unsigned lanes, unsigned hard) {
  return unsigned(__popc(lanes)) | unsigned(__popc(lanes & hard)) << kHardShift;
}

template <class L>
__global__ void __launch_bounds__(kThreads)
    count_kernel(Pixels<L> pixels, int tiles_per_range, int* histogram) {
  const int classes = pixels.classes, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int* const counts = dynamic_shared<int>();  // [2, C]
  for (int c = threadIdx.x; c < 2 * classes; c += kThreads) counts[c] = 0;
  __syncthreads();
  for (int tile = 0; tile < tiles_per_range; ++tile) {
    const int64_t first = (int64_t(blockIdx.x) * tiles_per_range + tile) * kTile + warp * (kTile / kWarps);
    if (first >= pixels.count) break;
    int of[kPerLane];
    unsigned hard;
    read_classes(pixels, first, of, hard);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const unsigned peers = __match_any_sync(kAll, of[i]), hard_lanes = __ballot_sync(kAll, hard >> i & 1);
      if (of[i] < 0 || lane != __ffs(int(peers)) - 1) continue;
      atomicAdd(&counts[of[i]], __popc(peers));
      atomicAdd(&counts[classes + of[i]], __popc(peers & hard_lanes));
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < 2 * classes; c += kThreads) {
    histogram[int64_t(c) * gridDim.x + blockIdx.x] = counts[c];
  }
}

struct Out {
  int *order, *start;
};

// Sets next[c] and next[C + c] to the places in the two lists of this block's first pixel of class c; the
// blocks share the filling of what follows the last class, and block 0 writes all starts. `totals` is shared
// scratch of 2 C values.
__device__ __forceinline__ void find_places(const int* histogram, int classes, int64_t pixels, int* totals,
                                            int* next, const Out& valid, const Out& hard) {
  __shared__ int listed[2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, ranges = gridDim.x;
  for (int c = warp; c < 2 * classes; c += kWarps) {
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
  if (warp < 2) {  // one list each
    int* const start = warp == 0 ? valid.start : hard.start;
    int sum = 0;
    for (int first = 0; first < classes; first += 32) {
      const int c = first + lane, n = c < classes ? totals[warp * classes + c] : 0;
      int up_to = n;
#pragma unroll
      for (int reach = 1; reach < 32; reach *= 2) {
        const int below = __shfl_up_sync(kAll, up_to, reach);
        if (lane >= reach) up_to += below;
      }
      if (c < classes) {
        next[warp * classes + c] += sum + up_to - n;
        if (blockIdx.x == 0) start[c] = sum + up_to - n;
      }
      sum += __shfl_sync(kAll, up_to, 31);
    }
    if (lane == 0) {
      listed[warp] = sum;
      if (blockIdx.x == 0) start[classes] = sum;
    }
  }
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(ranges) * kThreads;
  for (int64_t i = listed[0] + first; i < pixels; i += step) valid.order[i] = -1;
  for (int64_t i = listed[1] + first; i < pixels; i += step) hard.order[i] = -1;
}

template <class L>
__global__ void __launch_bounds__(kThreads)
    place_kernel(Pixels<L> pixels, int tiles_per_range, const int* histogram, Out valid, Out hard) {
  const int classes = pixels.classes, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int* const next = dynamic_shared<int>();                                   // [2, C]
  unsigned* const counts = reinterpret_cast<unsigned*>(next + 2 * classes);  // [warps, C]
  unsigned* const mine = counts + warp * classes;
  find_places(histogram, classes, pixels.count, reinterpret_cast<int*>(counts), next, valid, hard);
  for (int tile = 0; tile < tiles_per_range; ++tile) {
    const int64_t tile_first = (int64_t(blockIdx.x) * tiles_per_range + tile) * kTile;
    if (tile_first >= pixels.count) break;
    const int64_t first = tile_first + warp * (kTile / kWarps);
    for (int c = lane; c < classes; c += 32) mine[c] = 0;
    __syncwarp();
    int of[kPerLane];
    unsigned rank[kPerLane], is_hard;
    read_classes(pixels, first, of, is_hard);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const unsigned peers = __match_any_sync(kAll, of[i]), below = peers & ((1u << lane) - 1);
      const unsigned hard_lanes = __ballot_sync(kAll, is_hard >> i & 1);
      rank[i] = of[i] < 0 ? 0 : mine[of[i]] + both_counts(below, hard_lanes);
      __syncwarp();
      if (of[i] >= 0 && below == 0) mine[of[i]] += both_counts(peers, hard_lanes);
      __syncwarp();
    }
    __syncthreads();
    // From each warp's counts to how many of the tile's pixels stand from its first one on, and `next` to the
    // tile's end.
    for (int c = threadIdx.x; c < classes; c += kThreads) {
      unsigned left = 0;
#pragma unroll
      for (int w = kWarps - 1; w >= 0; --w) {
        left += counts[w * classes + c];
        counts[w * classes + c] = left;
      }
      next[c] += int(left & kValidMask);
      next[classes + c] += int(left >> kHardShift);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (of[i] < 0) continue;
      const int pixel = int(first + 32 * i + lane);
      const unsigned left = mine[of[i]];
      valid.order[next[of[i]] - int(left & kValidMask) + int(rank[i] & kValidMask)] = pixel;
      if (is_hard >> i & 1) {
        hard.order[next[classes + of[i]] - int(left >> kHardShift) + int(rank[i] >> kHardShift)] = pixel;
      }
    }
    __syncwarp();
  }
}

template <class L>
ClassLists sort(const OnDeviceOf& device, const Tensor& label, const Tensor& valid, const Tensor& hard,
                int classes) {
  const Pixels<L> pixels{static_cast<const L*>(label.const_data_ptr()), valid.const_data_ptr<bool>(),
                         hard.const_data_ptr<bool>(), label.numel(), classes};
  const int64_t tiles = std::max<int64_t>(1, ceil_div(pixels.count, kTile));
  const int64_t tiles_per_range = ceil_div(tiles, kRangesPerMultiprocessor * device.multiprocessors());
  const dim3 ranges(unsigned(ceil_div(tiles, tiles_per_range)));
  Tensor histogram = empty_like_of(label, {2, classes, ranges.x}, ScalarType::Int);
  const auto list = [&] {
    return ClassList{empty_like_of(label, {pixels.count}, ScalarType::Int),
                     empty_like_of(label, {classes + 1}, ScalarType::Int)};
  };
  ClassLists lists{list(), list()};
  const auto out = [](ClassList& list) {
    return Out{list.order.mutable_data_ptr<int32_t>(), list.start.mutable_data_ptr<int32_t>()};
  };
  launch(count_kernel<L>, ranges, dim3(kThreads), 2 * classes * sizeof(int), device.stream(), pixels,
         int(tiles_per_range), histogram.mutable_data_ptr<int32_t>());
  launch(place_kernel<L>, ranges, dim3(kThreads), (kWarps + 2) * classes * sizeof(int), device.stream(),
         pixels, int(tiles_per_range), histogram.const_data_ptr<int32_t>(), out(lists.valid),
         out(lists.hard));
  return lists;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> class_lists_op(Tensor label, Tensor valid, Tensor hard,
                                                          int64_t num_classes) {
  const ClassLists lists = class_lists(OnDeviceOf(label), label, valid, hard, num_classes);
  return {lists.valid.order, lists.valid.start, lists.hard.order, lists.hard.start};
}

}  // namespace

ClassLists class_lists(const OnDeviceOf& device, const Tensor& label, const Tensor& valid, const Tensor& hard,
                       int64_t num_classes) {
  STD_TORCH_CHECK(num_classes <= kMaxClasses, "num_classes must be at most ", kMaxClasses, " on CUDA; got ",
                  num_classes);
  const int classes = int(num_classes);
  switch (label.scalar_type()) {
    case ScalarType::Byte:
      return sort<uint8_t>(device, label, valid, hard, classes);
    case ScalarType::Char:
      return sort<int8_t>(device, label, valid, hard, classes);
    case ScalarType::Short:
      return sort<int16_t>(device, label, valid, hard, classes);
    case ScalarType::Int:
      return sort<int32_t>(device, label, valid, hard, classes);
    default:
      return sort<int64_t>(device, label, valid, hard, classes);
  }
}

}  // namespace prcl::cuda

PRCL_CUDA_LIBRARY(m) { m.impl("class_lists", TORCH_BOX(&prcl::cuda::class_lists_op)); }
