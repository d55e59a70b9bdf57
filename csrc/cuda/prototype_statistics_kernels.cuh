// The CUDA kernels of the prototype statistics: sums of 1 / var and mu / var over each class's pixels.
//
// Two kernels, one for each memory format, write partial sums [slot, 2, width]; merge_kernel adds each
// class's slots in a fixed order in float64. No atomics: the result depends on the input and on the number of
// multiprocessors alone.
//
// Rows (channels_last): a warp owns an equal share of the list of counted pixels. The list is sorted by
// class, so that sums stay in registers until the class changes, which is rare however labels lie in the
// image. Each row is read once, 16 bytes a lane, a few rows ahead; rows that do not count are never read.
// Where a row needs fewer than 32 lanes, groups of lanes take different rows; where it needs more, blockIdx.y
// counts slices of channels. float32 sums run over at most 32 pixels, and these sums over a warp's share.
// Warp w puts its sums of class c into slot w + c: along the list, w or c grows from one slot to the next.
//
// Planes (contiguous NCHW): a block owns kChannels channels, one range of pixels and at most kTableClasses
// classes. A tile of pixels is read once, 16 bytes a lane along the pixels, and put into shared memory; then
// each thread walks over the tile's pixels of one channel. A run of one class stays in registers and is added
// to the thread's float64 sums in shared memory when the class changes or the tile ends. Range r puts class c
// into slot r * C + c.
//
// The inverse norms of the means, where they are asked for, come out of the same pass: a block that has a
// whole row writes its inverse norm; blocks that have a slice of its channels write the sums of squares of
// theirs, [slices, pixels], and norms_kernel adds the slices in order.
//
// The reciprocal is the hardware's (1 ulp).
#pragma once

#include "cuda/approximate.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector_load.cuh"
#include "shared/labels.h"
#include "shared/norm.h"

#include <type_traits>

namespace prcl::cuda::prototype {

constexpr unsigned kAll = 0xFFFFFFFF;

constexpr int kWarps = 8, kRowThreads = 32 * kWarps;
template <class Mu, class Var>
constexpr int kInFlight = sizeof(Mu) == sizeof(Var) ? 4 : 2;  // rows, so that registers suffice
constexpr int kMinLanes = 4;  // of a row, so that the rows in flight of all groups are at most 32

constexpr int kChannels = 64, kPlaneThreads = kChannels;
constexpr int kTableClasses = 48;
constexpr int kVectorsPerRow = 8;  // of means in a tile: one channel's pixels
template <class Mu>
constexpr int kTilePixels = kVectorsPerRow * kVector<Mu>;
// Vectors in the tile's row of S: one more between rows spreads the channels over the banks.
template <class S, class Mu>
constexpr int kRowVectors = kTilePixels<Mu> / kVector<S> + 1;

constexpr int kNormThreads = 256;
constexpr int kMergeThreads = 32;  // in x over channels, in y over slots

template <class Mu, class Var, int kWidth>
__device__ __forceinline__ void accumulate(const Values<Mu, kWidth>& mu, const Values<Var, kWidth>& var,
                                           float (&precision)[kWidth], float (&mean)[kWidth]) {
  float m[kWidth], v[kWidth];
  unpack(mu, m);
  unpack(var, v);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float r = approximate_reciprocal(v[i]);
    precision[i] += r;
    mean[i] = fmaf(m[i], r, mean[i]);
  }
}

template <class S, int kWidth>
__device__ __forceinline__ float sum_of_squares(const Values<S, kWidth>& packed) {
  float values[kWidth], sum = 0;
  unpack(packed, values);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum = fmaf(values[i], values[i], sum);
  return sum;
}

// Number of counted pixels that each of `units` warps owns.
__device__ __forceinline__ int64_t share(int64_t counted, int64_t units) {
  return (counted + units - 1) / units;
}

// mu, var [pixels, dims]; order, start: the class lists; partial [warps + C, 2, width]. `lanes` is a power of
// two, at least kMinLanes. norms: [pixels] inverse norms where gridDim.y is 1, else sums of squares
// [gridDim.y, pixels]; null where nobody asks.
template <class Mu, class Var, bool kAligned>
__global__ void __launch_bounds__(kRowThreads, 2)
    rows_kernel(const Mu* mu, const Var* var, const int* order, const int* start, int classes, int64_t dims,
                int64_t width, int lanes, float* partial, float* norms, int64_t all_pixels) {
  constexpr int kWidth = kVector<Mu>, kRows = kInFlight<Mu, Var>;  // channels of a lane; rows in flight
  const int lane = threadIdx.x % 32, group = lane / lanes, groups = 32 / lanes;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t channel = (int64_t(blockIdx.y) * 32 + lane % lanes) * kWidth;
  const int64_t loaded = channel < dims ? channel : 0;  // lanes past the row's end do as the first one does
  const int64_t counted = start[classes], pixels = share(counted, int64_t(gridDim.x) * kWarps);
  int64_t at = warp * pixels;
  const int64_t last = at + pixels < counted ? at + pixels : counted;
  if (at >= last) return;
  int c = 0;  // the last class that starts at or before `at`
  for (int above = classes; above - c > 1;) {
    const int middle = (c + above) / 2;
    (start[middle] <= at ? c : above) = middle;
  }
  for (; at < last; ++c) {
    const int64_t end = start[c + 1] < last ? start[c + 1] : last;
    if (at >= end) continue;
    float precision[kWidth] = {}, mean[kWidth] = {};
    int next = at + lane < end ? order[at + lane] : -1;
    for (; at < end; at += 32) {
      const int mine = next, here = end - at < 32 ? int(end - at) : 32;
      next = at + 32 + lane < end ? order[at + 32 + lane] : -1;
      float step_precision[kWidth] = {}, step_mean[kWidth] = {};
      const auto add_rows = [&](auto all_there, int first) {
        Values<Mu, kWidth> m[kRows];
        Values<Var, kWidth> v[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int64_t pixel = __shfl_sync(kAll, mine, first + i * groups + group);
          const int64_t from = pixel * dims + loaded, count = dims - loaded;
          if (decltype(all_there)::value || pixel >= 0) {
            m[i] = load_values<kWidth, kAligned>(mu + from, count, 0.0f);
            v[i] = load_values<kWidth, kAligned>(var + from, count, INFINITY);
          } else {  // infinite variance adds nothing
            m[i] = load_values<kWidth, false>(mu, 0, 0.0f);
            v[i] = load_values<kWidth, false>(var, 0, INFINITY);
          }
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) accumulate(m[i], v[i], step_precision, step_mean);
        if (norms == nullptr) return;
        float squares[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) squares[i] = channel < dims ? sum_of_squares(m[i]) : 0.0f;
        const float square = warp_sums(squares, lanes);  // of row lane % kRows
        const int pixel = __shfl_sync(kAll, mine, first + lane % kRows * groups + group);
        if (lane % lanes >= kRows || pixel < 0) return;
        norms[blockIdx.y * all_pixels + pixel] = gridDim.y == 1 ? inverse_norm(square) : square;
      };
      int first = 0;
      for (; first + kRows * groups <= here; first += kRows * groups) add_rows(std::true_type{}, first);
      if (first < here) add_rows(std::false_type{}, first);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        precision[i] += step_precision[i];
        mean[i] += step_mean[i];
      }
    }
    at = end;
    for (int across = lanes; across < 32; across *= 2) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        precision[i] += __shfl_xor_sync(kAll, precision[i], across);
        mean[i] += __shfl_xor_sync(kAll, mean[i], across);
      }
    }
    if (group != 0 || channel >= dims) continue;
    float* const to = partial + (warp + c) * 2 * width + channel;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      to[i] = precision[i];
      to[width + i] = mean[i];
    }
  }
}

// mu, var [B, dims, plane]; tiles = B * ceil(plane / kTilePixels); partial [ranges, C, 2, width]; norms
// as in rows_kernel. Dynamic shared memory: float64 [min(C, kTableClasses), 2, kChannels].
template <class Mu, class Var, bool kAligned>
__global__ void __launch_bounds__(kPlaneThreads)
    planes_kernel(const Mu* mu, const Var* var, Labels label, const bool* valid, int classes, int64_t dims,
                  int64_t plane, int64_t tiles, int64_t tiles_per_range, int64_t width, float* partial,
                  float* norms, int64_t all_pixels) {
  constexpr int kPixels = kTilePixels<Mu>, kWidth = kVector<Mu>, kParts = kWidth / kVector<Var>;
  constexpr int kRowsAtOnce = kPlaneThreads / kVectorsPerRow, kSteps = kChannels / kRowsAtOnce;
  constexpr int kInRegisters = kSteps / kParts;  // steps whose loads are in flight together
  static_assert(kPixels <= kPlaneThreads, "a thread finds the class of one pixel of the tile");
  __shared__ Vector<Mu> mu_tile[kChannels][kRowVectors<Mu, Mu>];
  __shared__ Vector<Var> var_tile[kChannels][kRowVectors<Var, Mu>];
  __shared__ int class_of[2][kPixels];  // two tiles': the next one's are found while others still read
  const int first_class = blockIdx.z * kTableClasses, thread = threadIdx.x;
  const int own_classes = classes - first_class < kTableClasses ? classes - first_class : kTableClasses;
  const int64_t first_channel = int64_t(blockIdx.y) * kChannels, channel = first_channel + thread;
  double* const sums = dynamic_shared<double>() + thread;  // the thread's column of the table
  for (int k = 0; k < 2 * own_classes; ++k) sums[k * kChannels] = 0;

  const int64_t tiles_per_plane = (plane + kPixels - 1) / kPixels;
  const int64_t first_tile = blockIdx.x * tiles_per_range;
  const int64_t last_tile = first_tile + tiles_per_range < tiles ? first_tile + tiles_per_range : tiles;
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t image = tile / tiles_per_plane, offset = (tile - image * tiles_per_plane) * kPixels;
    int* const classes_here = class_of[tile % 2];
    bool counts = false;
    if (thread < kPixels) {
      const int64_t pixel = image * plane + offset + thread;
      const bool inside = offset + thread < plane, kept = inside && valid[pixel];
      const int c = (inside ? label.at(pixel, classes) : -1) - first_class;
      counts = kept && c >= 0 && c < own_classes;
      classes_here[thread] = counts ? c : -1;
    }
    if (!__syncthreads_or(counts)) continue;

    const int column = thread % kVectorsPerRow;
    bool needed = false;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) needed |= classes_here[column * kWidth + i] >= 0;
#pragma unroll
    for (int first = 0; first < kSteps; first += kInRegisters) {
      Values<Mu, kWidth> m[kInRegisters] = {};
      Values<Var, kWidth> v[kInRegisters] = {};
      const int first_row = thread / kVectorsPerRow + first * kRowsAtOnce;
#pragma unroll
      for (int i = 0; i < kInRegisters; ++i) {
        const int64_t row = first_channel + first_row + i * kRowsAtOnce;
        const int64_t pixel = offset + column * kWidth;
        if (!needed) continue;
        // A channel past the last one is never written: any row will do.
        const int64_t from = (image * dims + (row < dims ? row : 0)) * plane + pixel;
        m[i] = load_values<kWidth, kAligned>(mu + from, plane - pixel, 0.0f);
        v[i] = load_values<kWidth, kAligned>(var + from, plane - pixel, 1.0f);
      }
#pragma unroll
      for (int i = 0; i < kInRegisters; ++i) {
        mu_tile[first_row + i * kRowsAtOnce][column] = m[i].part[0];
#pragma unroll
        for (int j = 0; j < kParts; ++j) {
          var_tile[first_row + i * kRowsAtOnce][column * kParts + j] = v[i].part[j];
        }
      }
    }
    __syncthreads();

    if (norms != nullptr && thread < kPixels && classes_here[thread] >= 0) {
      const int channels = dims - first_channel < kChannels ? int(dims - first_channel) : kChannels;
      float square = 0;
      for (int row = 0; row < channels; ++row) {
        const float value = float(reinterpret_cast<const Mu*>(mu_tile[row])[thread]);
        square = fmaf(value, value, square);
      }
      norms[blockIdx.y * all_pixels + image * plane + offset + thread] =
          gridDim.y == 1 ? inverse_norm(square) : square;
    }

    int run = -1;
    float precision = 0, mean = 0;
    const auto end_run = [&] {
      if (run < 0) return;
      sums[2 * run * kChannels] += precision;
      sums[(2 * run + 1) * kChannels] += mean;
      precision = mean = 0;
    };
    for (int i = 0; i < kVectorsPerRow; ++i) {
      float values[kWidth], variances[kWidth];
      Values<Var, kWidth> packed;
#pragma unroll
      for (int j = 0; j < kParts; ++j) packed.part[j] = var_tile[thread][i * kParts + j];
      unpack(mu_tile[thread][i], values);
      unpack(packed, variances);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int c = classes_here[i * kWidth + j];
        if (c != run) {
          end_run();
          run = c;
        }
        if (c < 0) continue;
        const float r = approximate_reciprocal(variances[j]);
        precision += r;
        mean = fmaf(values[j], r, mean);
      }
    }
    end_run();
  }
  if (channel >= dims) return;
  for (int k = 0; k < own_classes; ++k) {
    float* const to = partial + (int64_t(blockIdx.x) * classes + first_class + k) * 2 * width + channel;
    to[0] = float(sums[2 * k * kChannels]);
    to[width] = float(sums[(2 * k + 1) * kChannels]);
  }
}

// inverse_norm [pixels] at the pixels of the class lists, from the sums of squares of `slices` slices.
__global__ void __launch_bounds__(kNormThreads)
    norms_kernel(const float* squares, int slices, int64_t pixels, const int* order, const int* counted,
                 float* norms) {
  const int64_t i = int64_t(blockIdx.x) * kNormThreads + threadIdx.x;
  if (i >= *counted) return;
  const int pixel = order[i];
  float square = 0;
  for (int slice = 0; slice < slices; ++slice) square += squares[slice * pixels + pixel];
  norms[pixel] = inverse_norm(square);
}

struct Slots {
  int64_t first, count, stride;
};

// Place of the sums of class c as written by rows_kernel, run by `parts` warps, or planes_kernel, for `parts`
// ranges.
__device__ __forceinline__ Slots slots_of(int c, bool rows, int64_t parts, const int* start, int classes) {
  if (!rows) return {c, parts, classes};
  if (start[c] == start[c + 1]) return {0, 0, 0};
  const int64_t pixels = share(start[classes], parts), first = start[c] / pixels;
  return {first + c, (start[c + 1] - 1) / pixels - first + 1, 1};
}

// Block (x, y, z): kMergeThreads channels of the precision (y = 0) or the weighted mean of class z.
__global__ void __launch_bounds__(kMergeThreads* kMergeThreads)
    merge_kernel(const float* partial, bool rows, int64_t parts, const int* start, int classes, int64_t dims,
                 int64_t width, float* precision, float* weighted_mean, int64_t* count) {
  __shared__ double sums[kMergeThreads][kMergeThreads];
  const int c = blockIdx.z, which = blockIdx.y, x = threadIdx.x, y = threadIdx.y;
  const int64_t channel = int64_t(blockIdx.x) * kMergeThreads + x;
  const Slots slots = slots_of(c, rows, parts, start, classes);
  double sum = 0;
  if (channel < dims) {
#pragma unroll 4
    for (int64_t i = y; i < slots.count; i += kMergeThreads) {
      sum += partial[((slots.first + i * slots.stride) * 2 + which) * width + channel];
    }
  }
  sums[y][x] = sum;
  __syncthreads();
  if (y > 0) return;
  for (int i = 1; i < kMergeThreads; ++i) sum += sums[i][x];
  if (channel < dims) (which == 0 ? precision : weighted_mean)[c * dims + channel] = float(sum);
  if (channel == 0 && which == 0) count[c] = start[c + 1] - start[c];
}

}  // namespace prcl::cuda::prototype
