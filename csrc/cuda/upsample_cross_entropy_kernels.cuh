// The CUDA kernels of the cross-entropy of upsampled logits.
//
// gradient_kernel: a block owns a tile of input pixels of one image and makes their gradients for K classes
// from every output pixel that touches them; the output pixels that two tiles share are computed in both, so
// that no two blocks write the same value. A thread walks down one output column (upsampling.cuh).
// Between two input rows it sums, for the upper and for the lower row, softmax times the pixel's weight in
// registers, and minus the weight at the pixel's own class in its column of shared memory. Where it passes an
// input row, the upper sums are added there, the block sums over the output columns of each input column, and
// writes one row of the tile. With all classes at hand (kAll) the same walk makes the softmax and the loss;
// otherwise blocks take kChunk classes each, and statistics_kernel has made the log-sums before.
//
// The approximate logarithm leaves an absolute error of at most 2e-7 in a pixel's loss; gradients do without
// it.
//
// Order of sums: output rows ascending in a thread, then output columns ascending; losses in a thread, then a
// tree over the block, then the blocks in ascending order.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/upsampling.cuh"

namespace prcl::cuda::upsample {

constexpr float kLn2 = float(prcl::kLn2);
constexpr int kCountThreads = 256;
constexpr int kStatisticsThreads = 128, kStatisticsRows = 16;
constexpr int kMaxTileThreads = 192;

// Target and weight of each output pixel. B*H*W is below 2^31.
struct Targets {
  const void* target;  // [B, H, W] uint8 or int64
  bool is_byte;
  int64_t ignore_index;
  const float* weight;  // [B] or [B, H, W] or null
  bool weight_of_pixel;
  const int* kept;  // partial counts for the mean, or null for the sum
  int kept_blocks;

  __device__ __forceinline__ int64_t at(int pixel) const {
    return is_byte ? int64_t(static_cast<const uint8_t*>(target)[pixel])
                   : static_cast<const int64_t*>(target)[pixel];
  }
  // The pixel's class, -1 if it is left out. A value that is no class is left out as well.
  __device__ __forceinline__ int class_of(int pixel, int classes) const {
    const int64_t value = at(pixel);
    return value != ignore_index && uint64_t(value) < uint64_t(classes) ? int(value) : -1;
  }
  __device__ __forceinline__ float weight_at(int image, int pixel) const {
    return weight == nullptr ? 1.0f : weight[weight_of_pixel ? pixel : image];
  }
  // The factor of every pixel's loss. All threads of the block must call it.
  __device__ __forceinline__ float scale() const {
    if (kept == nullptr) return 1.0f;
    int mine = 0;
    for (int i = int(threadIdx.x); i < kept_blocks; i += int(blockDim.x)) mine += kept[i];
    return 1.0f / float(max(block_sum(mine), 1));
  }
};

// Block i counts its share of the pixels that are kept.
__global__ void __launch_bounds__(kCountThreads) count_kernel(Targets targets, int64_t pixels, int* kept) {
  int mine = 0;
  const int64_t stride = int64_t(gridDim.x) * kCountThreads;
  for (int64_t i = int64_t(blockIdx.x) * kCountThreads + threadIdx.x; i < pixels; i += stride) {
    mine += targets.at(int(i)) != targets.ignore_index;
  }
  mine = block_sum(mine);
  if (threadIdx.x == 0) kept[blockIdx.x] = mine;
}

// Any number of classes: the loss and, if asked for, each pixel's log-sum, in powers of two.
template <class S>
__global__ void __launch_bounds__(kStatisticsThreads, 4)
    statistics_kernel(Logits<S> logits, Targets targets, float* log_sum, float* partial_loss) {
  const int height = int(logits.rows.output), width = int(logits.columns.output);
  const int tiles = (width + kStatisticsThreads - 1) / kStatisticsThreads,
            strips = (height + kStatisticsRows - 1) / kStatisticsRows;
  const int column = int(blockIdx.x) % tiles * kStatisticsThreads + int(threadIdx.x);
  const int image = int(blockIdx.x) / tiles / strips,
            first = int(blockIdx.x) / tiles % strips * kStatisticsRows;
  const float scale = targets.scale();
  const Position across = position_of(logits.columns, min(column, width - 1));
  const Column<S, 1, false> one_class(logits, image, 0, across);
  float loss = 0.0f;
  walk<S, kChunk, false>(logits, image, across, first, min(first + kStatisticsRows, height),
                         dynamic_shared<Softmax>() + threadIdx.x, kStatisticsThreads,
                         [&](int row, const Position& down, const Softmax& softmax) {
                           if (column >= width) return;
                           const int pixel = (image * height + row) * width + column;
                           const float sum = softmax.highest + approximate_log2(softmax.sum);
                           if (log_sum != nullptr) log_sum[pixel] = sum;
                           const int target = targets.class_of(pixel, logits.classes);
                           if (target < 0) return;
                           const float factor = scale * targets.weight_at(image, pixel) * kLn2;
                           loss += (sum - one_class.read(target, down)) * factor;
                         });
  loss = block_sum(loss);
  if (threadIdx.x == 0) partial_loss[blockIdx.x] = loss;
}

// Shared memory of a block: the sums of the upper row as [class][output column], spread so that every fourth
// output column lies in another bank; the fraction of each output column; the first output column of each
// input column.
constexpr int kPitch = kMaxTileThreads + kMaxTileThreads / 32;
constexpr int kAtOnce = 6;  // classes that a thread sums over output columns at the same time
template <int K>
constexpr int kSums = (K + kAtOnce - 1) / kAtOnce * kAtOnce * kPitch;

__device__ __forceinline__ int slot(int output) { return output + output / 32; }

// A block's part of the input, and its threads.
struct Tile {
  int rows, columns, threads;

  template <int K>
  size_t shared_bytes() const {
    return sizeof(float) * (2 * kSums<K> + threads) + sizeof(int) * (columns + 2);
  }
};

// values[i], without an array that is indexed at run time.
template <int K>
__device__ __forceinline__ float select(const float (&values)[K], int i) {
  float left[K];
#pragma unroll
  for (int j = 0; j < K; ++j) left[j] = values[j];
#pragma unroll
  for (int step = 1; step < K; step *= 2) {
#pragma unroll
    for (int j = 0; j + step < K; j += 2 * step) left[j] = i & step ? left[j + step] : left[j];
  }
  return left[0];
}

// Sums a row of the tile over its output columns begin .. end - 1 and writes it, or adds it to what an
// earlier batch of columns has written. `sums` and `fractions` start at `begin`; `starts` are those of the
// tile.
template <int K>
__device__ __forceinline__ void write_row(const Tile& tile, int columns, const float* sums,
                                          const float* fractions, const int* starts, int begin, int end,
                                          bool adds, int classes, int64_t plane, float* row) {
  const int group = int(threadIdx.x) / tile.columns, groups = tile.threads / tile.columns,
            i = int(threadIdx.x) % tile.columns;
  if (group >= groups || i >= columns) return;
  const int first = max(starts[i] - begin, 0), middle = starts[i + 1] - begin,
            last = min(starts[i + 2], end) - begin;
  for (int c = group * kAtOnce; c < classes; c += groups * kAtOnce) {
    float total[kAtOnce] = {};
#pragma unroll 2
    for (int output = first; output < last; ++output) {
      const float fraction = fractions[output], weight = output < middle ? fraction : 1.0f - fraction;
      const float* from = sums + c * kPitch + slot(output);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) total[j] = fmaf(weight, from[j * kPitch], total[j]);
    }
    float* to = row + c * plane + i;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (c + j >= classes) break;
      *to = adds ? *to + total[j] : total[j];
      to += plane;
    }
  }
}

template <class S, int K, bool kAll>
__global__ void __launch_bounds__(kMaxTileThreads, 2)
    gradient_kernel(Logits<S> logits, Targets targets, const float* log_sum, Tile tile, float* grad,
                    float* partial_loss) {
  const int height = int(logits.rows.output), width = int(logits.columns.output);
  const int input_height = int(logits.rows.input), input_width = int(logits.columns.input);
  const int classes = kAll ? K : logits.classes, thread = int(threadIdx.x);
  const int tiles = (input_width + tile.columns - 1) / tile.columns,
            strips = (input_height + tile.rows - 1) / tile.rows, chunks = (classes + K - 1) / K;
  int block = int(blockIdx.x);
  const int first_column = block % tiles * tile.columns;
  block /= tiles;
  const int first_row = block % strips * tile.rows;
  block /= strips;
  const int first_class = block % chunks * K, image = block / chunks;
  const int end_row = min(first_row + tile.rows, input_height);
  const int end_column = min(first_column + tile.columns, input_width);
  const int64_t plane = int64_t(input_height) * input_width;
  grad += (int64_t(image) * classes + first_class) * plane + first_column;

  float* const sums = dynamic_shared<float>();
  float* const fractions = sums + 2 * kSums<K>;
  int* const starts = reinterpret_cast<int*>(fractions + tile.threads);
  // starts[i]: the first output column whose left input is first_column - 1 + i.
  for (int i = thread; i < tile.columns + 2; i += tile.threads) {
    starts[i] = first_at(logits.columns, first_column - 1 + i);
  }
  float* const mine = sums + slot(thread);  // this thread's output column
  const auto clear = [&](float* of_row) {
#pragma unroll
    for (int c = 0; c < K; ++c) of_row[c * kPitch] = 0.0f;
  };
  clear(mine);
  clear(mine + kSums<K>);
  const float scale = targets.scale();
  float loss = 0.0f;
  __syncthreads();

  // More output columns touch the tile than the block has threads only where few inputs make many outputs. A
  // tile that none touches still writes its zeros.
  const int first_output = starts[0], end_output = first_at(logits.columns, end_column);
  int batch = first_output;
  do {
    const int x = batch + thread;
    const bool active = x < end_output;
    const Position across = position_of(logits.columns, active ? x : first_output);
    fractions[thread] = across.fraction;
    const bool owns_column = across.low >= first_column;
    Column<S, K, kAll> column(logits, image, first_class, across);
    float upper[K] = {}, lower[K] = {};
    float *upper_shared = mine, *lower_shared = mine + kSums<K>;

    int y = first_at(logits.rows, first_row - 1), pixel = (image * height + y) * width + x;
    RowPositions positions(logits.rows, y);
    Position down = positions.at(y);
#pragma unroll 1
    for (int row = max(first_row - 1, 0); row < end_row; ++row) {
#pragma unroll 1
      for (; y < height && down.low == row; down = positions.at(++y), pixel += width) {
        column.move_to(down.low, down.high);
        const int target = active ? targets.class_of(pixel, classes) : -1;
        if (target < 0) continue;
        const float factor = scale * targets.weight_at(image, pixel);
        float p[K], highest, sum = 0.0f;
#pragma unroll
        for (int c = 0; c < K; ++c) p[c] = column.value(c, down.fraction);
        if constexpr (kAll) {
          highest = p[0];
#pragma unroll
          for (int c = 1; c < K; ++c) highest = fmaxf(highest, p[c]);
        } else {
          highest = log_sum[pixel];
        }
        const float of_target = kAll ? select(p, target) : 0.0f;
#pragma unroll
        for (int c = 0; c < K; ++c) {
          p[c] = approximate_exp2(p[c] - highest);
          sum += p[c];
        }
        if (kAll && owns_column && row >= first_row) {
          loss += (highest - of_target + approximate_log2(sum)) * (factor * kLn2);
        }
        const float inverse = kAll ? approximate_reciprocal(sum) : 1.0f;
        const float of_lower = down.fraction * factor, of_upper = factor - of_lower;
        const float to_upper = of_upper * inverse, to_lower = of_lower * inverse;
#pragma unroll
        for (int c = 0; c < K; ++c) {
          upper[c] = fmaf(p[c], to_upper, upper[c]);
          lower[c] = fmaf(p[c], to_lower, lower[c]);
        }
        const int own = target - first_class;
        if (kAll || (own >= 0 && own < K)) {
          upper_shared[own * kPitch] -= of_upper;
          lower_shared[own * kPitch] -= of_lower;
        }
      }

      // The upper row has had all its pixels. The row before the tile is another block's.
      if (row >= first_row) {
#pragma unroll
        for (int c = 0; c < K; ++c) upper_shared[c * kPitch] += upper[c];
        __syncthreads();
        write_row<K>(tile, end_column - first_column, sums + (upper_shared - mine), fractions, starts, batch,
                     min(end_output, batch + tile.threads), batch > first_output,
                     min(K, classes - first_class), plane, grad + int64_t(row) * input_width);
        __syncthreads();
      }
      clear(upper_shared);
      float* const cleared = upper_shared;
      upper_shared = lower_shared;
      lower_shared = cleared;
#pragma unroll
      for (int c = 0; c < K; ++c) {
        upper[c] = lower[c];
        lower[c] = 0.0f;
      }
    }
    clear(upper_shared);  // it belongs to the row after the tile
    __syncthreads();      // `fractions` are written anew
    batch += tile.threads;
  } while (batch < end_output);
  if constexpr (kAll) {
    loss = block_sum(loss);
    if (thread == 0) partial_loss[blockIdx.x] = loss;
  }
}

}  // namespace prcl::cuda::upsample
