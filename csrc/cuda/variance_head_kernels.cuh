// The CUDA kernels of the probability head's tail, on rows x [P, D]: two passes forward, two backward.
//
// A block owns a range of neighbouring rows (blockIdx.x) and a slice of channels (blockIdx.y). A row's
// channels lie side by side over `lanes` threads, 16 bytes of x each; kThreads / lanes rows are read at once,
// and kInFlight of a thread's own before the arithmetic. What a channel's pixels share stays in registers.
//
// Sums: a thread adds its own rows in ascending order in float32, the block the threads of a channel in
// ascending order in float64, and a last kernel the blocks in a fixed order in float64. No atomics: the
// result depends on the input and on the number of multiprocessors alone. The moments of a thread are sums of
// x - k and of its square, k the thread's first value: one of those added, so that a mean far from zero
// costs their difference no digits. They are merged about the common mean; all means are
// differences to x's first row until the end, so that values far from zero keep their digits.
//
// sigma^2 is made from t = 2^-|z / log 2|, in which nothing overflows; 1 / log 2 is part of gain and bias.
#pragma once

#include "cuda/approximate.cuh"
#include "cuda/vector_load.cuh"
#include "shared/constants.h"

#include <type_traits>

namespace prcl::cuda::head {

constexpr int kThreads = 256;
constexpr int kMergeThreads = 32;  // in x over channels, in y over parts
// Blocks of each kernel on a multiprocessor, which its registers must allow.
constexpr int kMomentsBlocks = 4, kForwardBlocks = 3, kBackwardBlocks = 2;
constexpr float kFloor = float(kVarianceFloor), kLog2E = float(prcl::kLog2E);

struct Shape {
  int64_t rows, dims;
  int lanes;             // threads of a row's slice, a power of two, at most 32
  int64_t rows_a_part;   // what a block owns; the last one may own fewer
  int64_t parts, width;  // partial sums are [parts, 2, width]
};

// A thread's place: its rows are first, first + step, ... below last, its channels from `channel` on.
template <class S>
struct Place {
  int64_t first, last, channel, count;  // count: of its channels, none past the row's end
  int step, slot, slots, in_slice;

  __device__ explicit Place(const Shape& shape) {
    const int lane = int(threadIdx.x) % shape.lanes;
    slot = int(threadIdx.x) / shape.lanes;
    step = slots = kThreads / shape.lanes;
    in_slice = lane * kVector<S>;
    channel = int64_t(blockIdx.y) * shape.lanes * kVector<S> + in_slice;
    count = channel < shape.dims ? shape.dims - channel : 0;
    const int64_t begin = int64_t(blockIdx.x) * shape.rows_a_part, end = begin + shape.rows_a_part;
    first = begin + slot;
    last = count == 0 ? 0 : end < shape.rows ? end : shape.rows;
  }
};

// N values as they lie in memory.
template <class S, int N>
struct Packed {
  static constexpr int kVectors = N / kVector<S>;
  Vector<S> vector[kVectors];
};

// Values past `count` are zero.
template <int N, bool kAligned, class S>
__device__ __forceinline__ Packed<S, N> read(const S* from, int64_t count) {
  Packed<S, N> packed;
#pragma unroll
  for (int i = 0; i < Packed<S, N>::kVectors; ++i) {
    const int at = i * kVector<S>;
    packed.vector[i] = kAligned ? load(from + at) : load_masked(from + at, count - at, 0.0f);
  }
  return packed;
}

template <class S, int N>
__device__ __forceinline__ void unpack(const Packed<S, N>& packed, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < Packed<S, N>::kVectors; ++i) {
    float part[kVector<S>];
    cuda::unpack(packed.vector[i], part);
#pragma unroll
    for (int j = 0; j < kVector<S>; ++j) to[i * kVector<S> + j] = part[j];
  }
}

template <bool kAligned, class S, int N>
__device__ __forceinline__ void write(const float (&values)[N], int64_t count, S* to) {
  if (!kAligned) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) to[i] = S(values[i]);
    }
    return;
  }
  constexpr int kPerWord = 4 / int(sizeof(S)), kWords = N / kPerWord;
  uint32_t words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    words[i] = 0;
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) {
      words[i] |= detail::bits_of(S(values[i * kPerWord + j])) << (j * 8 * int(sizeof(S)) % 32);
    }
  }
#pragma unroll
  for (int i = 0; i < kWords / 4; ++i) {
    reinterpret_cast<uint4*>(to)[i] =
        make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }
}

// Values that all pixels of a channel share.
struct Parameters {
  const float *mean, *var, *gamma, *beta;
  const float* means;  // of the gradient [2, D], or null
  float eps;

  __device__ float inverse_std(int64_t channel) const { return 1.0f / sqrtf(var[channel] + eps); }
  __device__ float bias() const { return *beta * kLog2E; }
};

// z / log 2 = (x - mean) * scale + bias, for the thread's channels; zero past the row's end.
template <int N>
struct Affine {
  float mean[N], scale[N], bias;

  __device__ Affine(const Parameters& parameters, int64_t channel, int64_t count) {
    bias = parameters.bias();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      mean[i] = i < count ? parameters.mean[channel + i] : 0.0f;
      scale[i] = i < count ? *parameters.gamma * parameters.inverse_std(channel + i) * kLog2E : 0.0f;
    }
  }
};

// d = 1 + (1 + f) t for z > 0, and else (1 + f) + t.
struct Sigmoid {
  bool positive;
  float t, inverse;

  __device__ __forceinline__ explicit Sigmoid(float z) {
    positive = z > 0;
    t = approximate_exp2(positive ? -z : z);
    inverse = approximate_reciprocal(positive ? fmaf(1.0f + kFloor, t, 1.0f) : (1.0f + kFloor) + t);
  }
  __device__ __forceinline__ float value() const {
    return (positive ? fmaf(kFloor, t, 1.0f) : kFloor + t) * inverse;
  }
  __device__ __forceinline__ float slope() const { return t * inverse * inverse; }
};

// Calls f(first row, how many) for the thread's rows, kRows of them at a time while there are so many, and
// then one by one.
template <int kRows, class F>
__device__ __forceinline__ void for_rows(int64_t row, int64_t last, int step, const F& f) {
  for (; row + (kRows - 1) * step < last; row += kRows * step) f(row, std::integral_constant<int, kRows>{});
  for (; row < last; row += step) f(row, std::integral_constant<int, 1>{});
}

// Number of a block's `rows` rows that belong to slot `slot` of `slots`.
__device__ __forceinline__ int64_t rows_of_slot(int64_t rows, int slot, int slots) {
  return rows > slot ? (rows - slot + slots - 1) / slots : 0;
}

__device__ __forceinline__ int64_t rows_of_part(const Shape& shape, int64_t part) {
  const int64_t left = shape.rows - part * shape.rows_a_part;
  return left < shape.rows_a_part ? left : shape.rows_a_part;
}

// Two values of each thread and channel, where the block can see them: [slots, lanes * kVector].
template <class S>
struct Gathered {
  float first[kThreads * kVector<S>], second[kThreads * kVector<S>];

  __device__ void put(const Place<S>& place, const Shape& shape, int i, float a, float b) {
    const int at = place.slot * shape.lanes * kVector<S> + place.in_slice + i;
    first[at] = a;
    second[at] = b;
  }
};

// partial: of each part, its mean less x's first row, and its sum of squared deviations.
template <class S, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMomentsBlocks)
    moments_kernel(const S* x, Shape shape, float* partial) {
  constexpr int N = kVector<S>, kInFlight = kAligned ? 4 : 1;
  __shared__ Gathered<S> gathered;
  const Place<S> place(shape);
  float origin[N], shift[N] = {}, sum[N] = {}, square[N] = {};
  int count = 0;
  if (place.first < place.last) {
    unpack(read<N, kAligned>(x + place.first * shape.dims + place.channel, place.count), shift);
    count = 1;
  }
  for_rows<kInFlight>(place.first + place.step, place.last, place.step, [&](int64_t row, auto rows) {
    constexpr int kRows = decltype(rows)::value;
    Packed<S, N> packed[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      packed[k] = read<N, kAligned>(x + (row + k * place.step) * shape.dims + place.channel, place.count);
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      float values[N];
      unpack(packed[k], values);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float difference = values[i] - shift[i];
        sum[i] += difference;
        square[i] = fmaf(difference, difference, square[i]);
      }
    }
    count += kRows;
  });
  unpack(read<N, kAligned>(x + (place.count > 0 ? place.channel : 0), place.count), origin);
  const float inverse = count > 0 ? 1.0f / float(count) : 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    gathered.put(place, shape, i, fmaf(sum[i], inverse, shift[i] - origin[i]),
                 square[i] - sum[i] * sum[i] * inverse);
  }
  __syncthreads();
  const int width = shape.lanes * N, c = int(threadIdx.x);
  if (c >= width) return;
  const int64_t rows = rows_of_part(shape, blockIdx.x);
  double mean = 0, squares = 0;
  for (int slot = 0; slot < place.slots; ++slot) {
    mean += double(rows_of_slot(rows, slot, place.slots)) * double(gathered.first[slot * width + c]);
  }
  mean /= double(rows);
  for (int slot = 0; slot < place.slots; ++slot) {
    const double distance = double(gathered.first[slot * width + c]) - mean;
    squares += double(gathered.second[slot * width + c]) +
               double(rows_of_slot(rows, slot, place.slots)) * distance * distance;
  }
  float* const to = partial + int64_t(blockIdx.x) * 2 * shape.width + int64_t(blockIdx.y) * width + c;
  to[0] = float(mean);
  to[shape.width] = float(squares);
}

// The sum of the block's values of one channel, in every thread of it.
__device__ __forceinline__ double sum_over_parts(double value,
                                                 double (&shared)[kMergeThreads][kMergeThreads]) {
  __syncthreads();  // it may still be read from an earlier call
  shared[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kMergeThreads; ++i) sum += shared[i][threadIdx.x];
  return sum;
}

// Block x: kMergeThreads channels.
template <class S>
__global__ void __launch_bounds__(kMergeThreads* kMergeThreads)
    merge_moments_kernel(const S* x, const float* partial, Shape shape, float* mean, float* var) {
  __shared__ double shared[kMergeThreads][kMergeThreads];
  const int64_t channel = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  const auto add_parts = [&](const auto& of_part) {
    double sum = 0;
    if (channel < shape.dims) {
      for (int64_t part = threadIdx.y; part < shape.parts; part += kMergeThreads) {
        const float* const from = partial + part * 2 * shape.width + channel;
        sum += of_part(double(rows_of_part(shape, part)), double(from[0]), double(from[shape.width]));
      }
    }
    return sum_over_parts(sum, shared) / double(shape.rows);
  };
  const double all = add_parts([](double rows, double of_part, double) { return rows * of_part; });
  const double spread = add_parts([all](double rows, double of_part, double squares) {
    return squares + rows * (of_part - all) * (of_part - all);
  });
  if (threadIdx.y > 0 || channel >= shape.dims) return;
  mean[channel] = float(double(float(x[channel])) + all);
  var[channel] = float(spread);
}

template <class S, class O, bool kAligned>
__global__ void __launch_bounds__(kThreads, kForwardBlocks)
    forward_kernel(const S* x, Shape shape, Parameters parameters, O* y) {
  constexpr int N = kVector<S>, kInFlight = kAligned ? 4 : 1;
  const Place<S> place(shape);
  const Affine<N> affine(parameters, place.channel, place.count);
  for_rows<kInFlight>(place.first, place.last, place.step, [&](int64_t row, auto rows) {
    constexpr int kRows = decltype(rows)::value;
    Packed<S, N> packed[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      packed[k] = read<N, kAligned>(x + (row + k * place.step) * shape.dims + place.channel, place.count);
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      float values[N];
      unpack(packed[k], values);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        values[i] = Sigmoid(fmaf(values[i] - affine.mean[i], affine.scale[i], affine.bias)).value();
      }
      write<kAligned>(values, place.count, y + (row + k * place.step) * shape.dims + place.channel);
    }
  });
}

// partial: of each part, the sums of dz and of dz * (x - mean).
template <class S, class O, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    backward_sums_kernel(const O* grad, const S* x, Shape shape, Parameters parameters, float* partial) {
  constexpr int N = kVector<S>, kInFlight = kAligned ? 4 : 1;
  __shared__ Gathered<S> gathered;
  const Place<S> place(shape);
  const Affine<N> affine(parameters, place.channel, place.count);
  float sum[N] = {}, product[N] = {};
  for_rows<kInFlight>(place.first, place.last, place.step, [&](int64_t row, auto rows) {
    constexpr int kRows = decltype(rows)::value;
    Packed<S, N> packed[kRows];
    Packed<O, N> packed_grad[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t at = (row + k * place.step) * shape.dims + place.channel;
      packed[k] = read<N, kAligned>(x + at, place.count);
      packed_grad[k] = read<N, kAligned>(grad + at, place.count);
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      float values[N], gradients[N];
      unpack(packed[k], values);
      unpack(packed_grad[k], gradients);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float centred = values[i] - affine.mean[i];
        const float grad_z = gradients[i] * Sigmoid(fmaf(centred, affine.scale[i], affine.bias)).slope();
        sum[i] += grad_z;
        product[i] = fmaf(grad_z, centred, product[i]);
      }
    }
  });
#pragma unroll
  for (int i = 0; i < N; ++i) gathered.put(place, shape, i, sum[i], product[i]);
  __syncthreads();
  const int width = shape.lanes * N, c = int(threadIdx.x);
  if (c >= width) return;
  double all = 0, all_products = 0;
  for (int slot = 0; slot < place.slots; ++slot) all += double(gathered.first[slot * width + c]);
  for (int slot = 0; slot < place.slots; ++slot) all_products += double(gathered.second[slot * width + c]);
  float* const to = partial + int64_t(blockIdx.x) * 2 * shape.width + int64_t(blockIdx.y) * width + c;
  to[0] = float(all);
  to[shape.width] = float(all_products);
}

// Block (x, y): kMergeThreads channels of the sum of dz (y = 0) or of dz * xhat; sums [2, D].
__global__ void __launch_bounds__(kMergeThreads* kMergeThreads)
    merge_sums_kernel(const float* partial, Shape shape, Parameters parameters, float* sums) {
  __shared__ double shared[kMergeThreads][kMergeThreads];
  const int64_t channel = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  double sum = 0;
  if (channel < shape.dims) {
    for (int64_t part = threadIdx.y; part < shape.parts; part += kMergeThreads) {
      sum += double(partial[(part * 2 + blockIdx.y) * shape.width + channel]);
    }
  }
  sum = sum_over_parts(sum, shared);
  if (threadIdx.y > 0 || channel >= shape.dims) return;
  const float factor = blockIdx.y == 0 ? 1.0f : parameters.inverse_std(channel);
  sums[blockIdx.y * shape.dims + channel] = float(sum * double(factor));
}

template <class S, class O, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    backward_kernel(const O* grad, const S* x, Shape shape, Parameters parameters, S* grad_x) {
  constexpr int N = kVector<S>, kInFlight = kAligned ? 2 : 1;
  const Place<S> place(shape);
  const Affine<N> affine(parameters, place.channel, place.count);
  // The part of the gradient that goes through the moments: a constant, and a multiple of x - mean.
  float gain[N], constant[N] = {}, slope[N] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= place.count) {
      gain[i] = 0;
      continue;
    }
    const int64_t channel = place.channel + i;
    const float inverse_std = parameters.inverse_std(channel);
    gain[i] = *parameters.gamma * inverse_std;
    if (parameters.means == nullptr) continue;
    constant[i] = gain[i] * parameters.means[channel];
    slope[i] = gain[i] * inverse_std * parameters.means[shape.dims + channel];
  }
  for_rows<kInFlight>(place.first, place.last, place.step, [&](int64_t row, auto rows) {
    constexpr int kRows = decltype(rows)::value;
    Packed<S, N> packed[kRows];
    Packed<O, N> packed_grad[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t at = (row + k * place.step) * shape.dims + place.channel;
      packed[k] = read<N, kAligned>(x + at, place.count);
      packed_grad[k] = read<N, kAligned>(grad + at, place.count);
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      float values[N], gradients[N];
      unpack(packed[k], values);
      unpack(packed_grad[k], gradients);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float centred = values[i] - affine.mean[i];
        const float grad_z = gradients[i] * Sigmoid(fmaf(centred, affine.scale[i], affine.bias)).slope();
        values[i] = fmaf(grad_z, gain[i], -fmaf(centred, slope[i], constant[i]));
      }
      write<kAligned>(values, place.count, grad_x + (row + k * place.step) * shape.dims + place.channel);
    }
  });
}

}  // namespace prcl::cuda::head
