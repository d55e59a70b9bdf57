// Bilinear upsampling of feature maps on CUDA, and its adjoint in gather form.
//
// A thread owns one column of the result and K neighbouring channels of it, the 16 bytes of a vector where
// both maps are channels_last and aligned, else one, and walks down a strip of its rows. Neighbouring threads
// own neighbouring channels in channels_last, else neighbouring columns.
//
// upsample_kernel keeps the two input rows around it, interpolated to its column, in registers: an output
// costs one fused multiply-add.
//
// gather_kernel owns input rows first .. last - 1. It passes every output row that reads them, from those
// between first - 1 and first on, sums the output columns that read its column, and adds this to the sums of
// the input rows above and below. Where it passes an input row, it writes that sum: each output is read by
// the two columns that it lies between, and the rows between two strips by both. No two threads write the
// same value.
//
// Order of sums: output columns ascending, then output rows ascending, wherever a strip begins.

#include "cuda/launch.h"
#include "cuda/storage.h"
#include "cuda/upsampling.cuh"

#include <algorithm>

namespace prcl::cuda {
namespace {

using upsample::FloatAxis;
using upsample::Position;

constexpr int kThreads = 256, kUpsampleRows = 16, kGatherRows = 8, kLeastGatherRows = 2;

// A map [B, C, rows, columns]; strides in values.
template <class S>
struct Map {
  S* data;
  int64_t of_image, of_channel, of_row, of_column;

  Map(const Tensor& map, S* values)
      : data(values),
        of_image(map.stride(0)),
        of_channel(map.stride(1)),
        of_row(map.stride(2)),
        of_column(map.stride(3)) {}

  __device__ __forceinline__ S* column(int image, int channel, int column) const {
    return data + image * of_image + channel * of_channel + column * of_column;
  }
};

// Shares of an image's threads in its result [groups of channels, rows, columns].
struct Shares {
  bool channels_last;
  int groups, columns, strips, rows_of_strip, rows;

  Shares(bool last, int64_t group_count, int64_t row_count, int64_t column_count, int most_rows)
      : channels_last(last),
        groups(int(group_count)),
        columns(int(column_count)),
        strips(int(ceil_div(row_count, most_rows))),
        rows_of_strip(most_rows),
        rows(int(row_count)) {}

  int64_t blocks_per_image() const { return ceil_div(int64_t(groups) * columns * strips, kThreads); }
};

// One thread's share; first == last for a surplus thread.
struct Share {
  int image, group, column, first, last;

  __device__ __forceinline__ explicit Share(const Shares& all) {
    const unsigned threads = unsigned(all.groups) * unsigned(all.columns) * unsigned(all.strips);
    const unsigned blocks = (threads + kThreads - 1) / kThreads;
    unsigned i = blockIdx.x % blocks * kThreads + threadIdx.x;
    image = int(blockIdx.x / blocks);
    const bool real = i < threads;
    const unsigned inner = all.channels_last ? all.groups : all.columns,
                   outer = all.channels_last ? all.columns : all.groups;
    const int in_inner = int(i % inner);
    i /= inner;
    const int in_outer = int(i % outer), strip = int(i / outer);
    group = all.channels_last ? in_inner : in_outer;
    column = all.channels_last ? in_outer : in_inner;
    first = strip * all.rows_of_strip;
    last = real ? min(first + all.rows_of_strip, all.rows) : first;
  }
};

template <class S, int K>
__device__ __forceinline__ void read(const S* from, float (&to)[K]) {
  if constexpr (K == 1) {
    to[0] = float(*from);
  } else {
    unpack(load(from), to);
  }
}

template <class S, int K>
__device__ __forceinline__ void write(S* to, const float (&from)[K]) {
  if constexpr (K == 1) {
    *to = S(from[0]);
  } else {
    store(to, pack<S>(from));
  }
}

template <class S, int K>
__global__ void __launch_bounds__(kThreads)
    upsample_kernel(Map<const S> from, Map<S> to, Shares shares, FloatAxis rows, FloatAxis columns) {
  const Share share(shares);
  if (share.first >= share.last) return;
  const int channel = share.group * K;
  const Position across = upsample::position_of(columns, share.column);
  const S *left = from.column(share.image, channel, across.low),
          *right = from.column(share.image, channel, across.high);
  S* out = to.column(share.image, channel, share.column) + share.first * to.of_row;
  int low = -1, high = -1;
  float top[K], bottom[K] = {};
#pragma unroll 1
  for (int row = share.first; row < share.last; ++row, out += to.of_row) {
    const Position down = upsample::position_of(rows, row);
    if (down.low != low) {
      // Row low is there where the last step ended on it.
#pragma unroll 1
      for (int steps = down.low == high ? 1 : 2; steps > 0; --steps) {
        const int64_t at = (steps == 1 ? down.high : down.low) * from.of_row;
        float at_left[K], at_right[K];
        read<S, K>(left + at, at_left);
        read<S, K>(right + at, at_right);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          top[k] = bottom[k];
          bottom[k] = fmaf(across.fraction, at_right[k] - at_left[k], at_left[k]);
        }
      }
      low = down.low;
      high = down.high;
    }
    float value[K];
#pragma unroll
    for (int k = 0; k < K; ++k) value[k] = fmaf(down.fraction, bottom[k] - top[k], top[k]);
    write<S, K>(out, value);
  }
}

template <class S, int K>
__global__ void __launch_bounds__(kThreads, K == 8 ? 3 : 4)
    gather_kernel(Map<const S> grad, Map<S> to, Shares shares, FloatAxis rows, FloatAxis columns) {
  const Share share(shares);
  if (share.first >= share.last) return;
  const int channel = share.group * K, column = share.column;
  // Output columns begin .. middle - 1 lie between the column and the one before it, middle .. end - 1
  // between it and the next.
  const int begin = upsample::first_at(columns, column - 1), middle = upsample::first_at(columns, column),
            end = upsample::first_at(columns, column + 1);
  const bool is_last = column == int(columns.input) - 1;
  const S* from = grad.column(share.image, channel, begin);
  S* out = to.column(share.image, channel, column) + share.first * to.of_row;
  float upper[K] = {}, lower[K] = {};
  int row = share.first - 1;  // that of `upper`
  // Moves on to `next`, and writes the rows that are done.
  const auto pass = [&](int next) {
#pragma unroll 1
    for (; row < next; ++row) {
      if (row >= share.first) {
        write<S, K>(out, upper);
        out += to.of_row;
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
        upper[k] = lower[k];
        lower[k] = 0.0f;
      }
    }
  };
#pragma unroll 1
  for (int y = upsample::first_at(rows, share.first - 1); y < int(rows.output); ++y) {
    const Position down = upsample::position_of(rows, y);
    if (down.low >= share.last) break;
    pass(down.low);
    float sum[K] = {};
    const S* at = from + y * grad.of_row;
#pragma unroll 4
    for (int x = begin; x < end; ++x, at += grad.of_column) {
      const float position = columns.position(float(x));
      const float of_high = position - float(column - 1),
                  of_low = is_last ? 1.0f : 1.0f - (position - float(column)),
                  weight = x < middle ? of_high : of_low;
      float value[K];
      read<S, K>(at, value);
#pragma unroll
      for (int k = 0; k < K; ++k) sum[k] = fmaf(weight, value[k], sum[k]);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      upper[k] = fmaf(1.0f - down.fraction, sum[k], upper[k]);
      lower[k] = fmaf(down.fraction, sum[k], lower[k]);
    }
  }
  pass(share.last);
}

// Whether all vectors of channels start at a multiple of 16 bytes.
template <class S>
bool has_vectors(const Tensor& map) {
  const bool steps =
      map.stride(0) % kVector<S> == 0 && map.stride(2) % kVector<S> == 0 && map.stride(3) % kVector<S> == 0;
  return map.stride(1) == 1 && steps &&
         rows_are_aligned(static_cast<const S*>(map.const_data_ptr()), map.size(1));
}

void check_blocks(int64_t images, const Shares& shares) {
  const int64_t blocks = shares.blocks_per_image();
  STD_TORCH_CHECK(images * blocks < int64_t(1) << 31 && blocks * kThreads < int64_t(1) << 32,
                  "upsample_bilinear: a larger map than one launch takes");
}

// Calls f with a null pointer to the values' type and the number of channels of a thread.
template <class F>
void dispatch_vectors(const Tensor& from, const Tensor& to, bool channels_last, const F& f) {
  dispatch_storage(from.scalar_type(), [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    if (channels_last && has_vectors<S>(from) && has_vectors<S>(to)) {
      return f(storage, std::integral_constant<int, kVector<S>>());
    }
    f(storage, std::integral_constant<int, 1>());
  });
}

Tensor upsample_bilinear(Tensor x, int64_t height, int64_t width, bool channels_last) {
  const OnDeviceOf device(x);
  Tensor out = map_like(x, height, width, channels_last);
  const FloatAxis rows(x.size(2), height), columns(x.size(3), width);
  dispatch_vectors(x, out, channels_last, [&](auto* storage, auto channels) {
    using S = std::remove_pointer_t<decltype(storage)>;
    constexpr int kChannels = decltype(channels)::value;
    const Shares shares(channels_last, x.size(1) / kChannels, height, width, kUpsampleRows);
    check_blocks(x.size(0), shares);
    launch(upsample_kernel<S, kChannels>, dim3(x.size(0) * shares.blocks_per_image()), dim3(kThreads), 0,
           device.stream(), Map<const S>(x, static_cast<const S*>(x.const_data_ptr())),
           Map<S>(out, static_cast<S*>(out.mutable_data_ptr())), shares, rows, columns);
  });
  return out;
}

Tensor upsample_bilinear_backward(Tensor grad, int64_t height, int64_t width, bool channels_last) {
  const OnDeviceOf device(grad);
  Tensor out = map_like(grad, height, width, channels_last);
  const FloatAxis rows(height, grad.size(2)), columns(width, grad.size(3));
  const int multiprocessors = device.multiprocessors();
  dispatch_vectors(grad, out, channels_last, [&](auto* storage, auto channels) {
    using S = std::remove_pointer_t<decltype(storage)>;
    constexpr int kChannels = decltype(channels)::value;
    const auto shares_for = [&](int most_rows) {
      return Shares(channels_last, grad.size(1) / kChannels, height, width, most_rows);
    };
    // High strips share fewer output rows, but there must be blocks enough for every multiprocessor.
    int most_rows = kGatherRows;
    while (most_rows > kLeastGatherRows &&
           grad.size(0) * shares_for(most_rows).blocks_per_image() < 4 * multiprocessors) {
      most_rows /= 2;
    }
    const Shares shares = shares_for(most_rows);
    check_blocks(grad.size(0), shares);
    launch(gather_kernel<S, kChannels>, dim3(grad.size(0) * shares.blocks_per_image()), dim3(kThreads), 0,
           device.stream(), Map<const S>(grad, static_cast<const S*>(grad.const_data_ptr())),
           Map<S>(out, static_cast<S*>(out.mutable_data_ptr())), shares, rows, columns);
  });
  return out;
}

}  // namespace
}  // namespace prcl::cuda

PRCL_CUDA_LIBRARY(m) {
  m.impl("upsample_bilinear", TORCH_BOX(&prcl::cuda::upsample_bilinear));
  m.impl("upsample_bilinear_backward", TORCH_BOX(&prcl::cuda::upsample_bilinear_backward));
}
