// Bilinearly upsampled logits, one output column at a time, without a [B, C, H, W] tensor.
//
// A thread owns one output column and walks down a strip of output rows; neighbouring threads own
// neighbouring columns. It keeps K classes of the two input rows around it, interpolated to its column, in
// registers: an input row is read once a strip, and an output pixel costs one fused multiply-add a class. All
// logits are kept in powers of two (times log2 e), so that the exponential is one instruction.
//
// Where the number of classes is no compile-time constant the strip is walked once for each kChunk classes,
// and the softmax of every pixel of the strip waits in shared memory between the walks.
#pragma once

#include "cuda/approximate.cuh"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/storage.h"
#include "shared/constants.h"
#include "shared/interpolation.h"

namespace prcl::cuda::upsample {

constexpr float kLog2E = float(prcl::kLog2E);
constexpr float kNoClass = -1e38f;  // the logit of what is past the last class: finite, and never the largest
constexpr int kChunk = 12;

using FloatAxis = Axis<float>;

template <class S>
struct Logits {
  const char* data;
  int64_t of_image, of_class, of_row, of_column;  // strides, in bytes
  int classes;
  FloatAxis rows, columns;
};

struct Position {
  int low, high;  // inputs that an output lies between
  float fraction;
};

// Where both inputs are one, all of the weight is on the first.
__device__ __forceinline__ Position position_of(const FloatAxis& axis, int output) {
  const Tap<float> tap = axis.tap(output);
  return {int(tap.low), int(tap.high), tap.high == tap.low ? 0.0f : tap.fraction};
}

// The first output position whose lower input is `low` or more.
__device__ inline int first_at(const FloatAxis& axis, int low) {
  int begin = 0, end = int(axis.output);
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (axis.tap(middle).low < low) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// The positions of output rows first, first + 1, ...: each lane works out every 32nd, and all lanes of the
// warp must walk down together.
class RowPositions {
 public:
  __device__ __forceinline__ RowPositions(const FloatAxis& axis, int first) : axis_(axis), first_(first) {
    look_up();
  }
  // Rows follow each other from call to call; past the last row it is the last row's position.
  __device__ __forceinline__ Position at(int row) {
    if (row == first_ + 32) {
      first_ = row;
      look_up();
    }
    const int low = __shfl_sync(kAllLanes, low_, row - first_);
    return {low, min(low + 1, int(axis_.input) - 1), __shfl_sync(kAllLanes, fraction_, row - first_)};
  }

 private:
  __device__ __forceinline__ void look_up() {
    const int row = first_ + int(threadIdx.x) % 32;
    const Position mine = position_of(axis_, min(row, int(axis_.output) - 1));
    low_ = mine.low;
    fraction_ = mine.fraction;
  }

  const FloatAxis& axis_;
  int first_, low_;
  float fraction_;
};

// K classes, from `first_class` on, at one output column between two input rows. kAll: there are no others.
template <class S, int K, bool kAll>
class Column {
 public:
  __device__ __forceinline__ Column(const Logits<S>& logits, int image, int first_class,
                                    const Position& column)
      : of_class_(logits.of_class),
        of_row_(logits.of_row),
        classes_(logits.classes - first_class),
        fraction_(column.fraction) {
    const char* data = logits.data + image * logits.of_image + first_class * logits.of_class;
    left_ = data + column.low * logits.of_column;
    right_ = data + column.high * logits.of_column;
  }

  // Makes input rows low and high those that the pixels lie between; rows ascend from call to call.
  __device__ __forceinline__ void move_to(int low, int high) {
    if (low == low_) return;
    // Row low is there where the last step ended on it.
#pragma unroll 1
    for (int left = low == high_ ? 1 : 2; left > 0; --left) {
      const int64_t row = (left == 1 ? high : low) * of_row_;
      const char *at_left = left_ + row, *at_right = right_ + row;
#pragma unroll
      for (int c = 0; c < K; ++c) {
        top_[c] = bottom_[c];
        bottom_[c] = kAll || c < classes_ ? between(at_left, at_right) : kNoClass;
        at_left += of_class_;
        at_right += of_class_;
      }
    }
#pragma unroll
    for (int c = 0; c < K; ++c) step_[c] = bottom_[c] - top_[c];
    low_ = low;
    high_ = high;
  }

  // The logit of class number c at `fraction` of the way down.
  __device__ __forceinline__ float value(int c, float fraction) const {
    return fmaf(fraction, step_[c], top_[c]);
  }

  // The same for a class that is known only at run time, with the same rounding.
  __device__ __forceinline__ float read(int c, const Position& row) const {
    const int64_t of_class = c * of_class_, low = row.low * of_row_ + of_class,
                  high = row.high * of_row_ + of_class;
    const float top = between(left_ + low, right_ + low), bottom = between(left_ + high, right_ + high);
    return fmaf(row.fraction, bottom - top, top);
  }

 private:
  __device__ __forceinline__ float between(const char* at_left, const char* at_right) const {
    const float left = float(*reinterpret_cast<const S*>(at_left)),
                right = float(*reinterpret_cast<const S*>(at_right));
    return __fmul_rn(fmaf(fraction_, right - left, left), kLog2E);
  }

  const char *left_, *right_;
  int64_t of_class_, of_row_;
  int classes_;
  float fraction_;
  int low_ = -1, high_ = -1;
  float top_[K], step_[K], bottom_[K] = {};
};

// The softmax of a pixel over the classes so far.
struct Softmax {
  float highest, sum;  // largest logit; sum of 2^(logit - highest)
  int argmax;          // the first class that has it
};

template <class S, int K, bool kAll>
__device__ __forceinline__ Softmax softmax_of(const Column<S, K, kAll>& column, float fraction) {
  float value[K];
#pragma unroll
  for (int c = 0; c < K; ++c) value[c] = column.value(c, fraction);
  Softmax result = {value[0], 0.0f, 0};
#pragma unroll
  for (int c = 1; c < K; ++c) result.highest = fmaxf(result.highest, value[c]);
#pragma unroll
  for (int c = K - 1; c >= 0; --c) {
    if (value[c] == result.highest) result.argmax = c;
  }
#pragma unroll
  for (int c = 0; c < K; ++c) result.sum += approximate_exp2(value[c] - result.highest);
  return result;
}

// Earlier classes win where the largest logits are equal.
__device__ __forceinline__ Softmax joined(const Softmax& earlier, const Softmax& later, int first_of_later) {
  const bool rises = later.highest > earlier.highest;
  const float highest = rises ? later.highest : earlier.highest;
  return {highest,
          earlier.sum * approximate_exp2(earlier.highest - highest) +
              later.sum * approximate_exp2(later.highest - highest),
          rises ? first_of_later + later.argmax : earlier.argmax};
}

// Calls done(row, position of the row, softmax) for output rows first .. last - 1 of a column, which are the
// same for all lanes of the warp. kAll: K is the number of classes; otherwise `waiting` holds one softmax a
// row for this thread, `stride` apart.
template <class S, int K, bool kAll, class Done>
__device__ __forceinline__ void walk(const Logits<S>& logits, int image, const Position& across, int first,
                                     int last, Softmax* waiting, int stride, const Done& done) {
  const int classes = kAll ? K : logits.classes;
#pragma unroll 1
  for (int first_class = 0; first_class < classes; first_class += K) {
    Column<S, K, kAll> column(logits, image, first_class, across);
    RowPositions positions(logits.rows, first);
#pragma unroll 1
    for (int row = first; row < last; ++row) {
      const Position down = positions.at(row);
      column.move_to(down.low, down.high);
      Softmax softmax = softmax_of(column, down.fraction);
      const int at = (row - first) * stride;
      if (!kAll && first_class > 0) softmax = joined(waiting[at], softmax, first_class);
      if (kAll || first_class + K >= classes) {
        done(row, down, softmax);
      } else {
        waiting[at] = softmax;
      }
    }
  }
}

template <class S>
Logits<S> logits_of(const Tensor& logits, int64_t height, int64_t width) {
  const auto bytes = [&](int dim) { return logits.stride(dim) * int64_t(sizeof(S)); };
  return {static_cast<const char*>(logits.const_data_ptr()),
          bytes(0),
          bytes(1),
          bytes(2),
          bytes(3),
          int(logits.size(1)),
          FloatAxis(logits.size(2), height),
          FloatAxis(logits.size(3), width)};
}

// Calls f with an integral_constant: the number of classes where there is a kernel for it, 0 for any other.
template <class F>
void dispatch_classes(int64_t classes, const F& f) {
  if (classes == 11) return f(std::integral_constant<int, 11>());  // CamVid
  if (classes == 19) return f(std::integral_constant<int, 19>());  // Cityscapes
  if (classes == 21) return f(std::integral_constant<int, 21>());  // Pascal VOC
  f(std::integral_constant<int, 0>());
}

}  // namespace prcl::cuda::upsample
