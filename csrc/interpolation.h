// Bilinear interpolation of one axis as torch.nn.functional.interpolate does it.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace prcl {

// Output position i lies at `fraction` of the way from input `low` to input `high`, which is low or low + 1.
template <class T>
struct Tap {
  int64_t low, high;
  T fraction;
};

template <class T>
struct Axis {
  int64_t input, output;
  T scale;
  bool align_corners;

  Axis(int64_t input_size, int64_t output_size, bool align)
      : input(input_size), output(output_size), align_corners(align) {
    if (align) {
      scale = output > 1 ? T(input - 1) / T(output - 1) : T(0);
    } else {
      scale = T(input) / T(output);
    }
  }

  // Where output i lies, in inputs: 0 at the first one or before it; it may lie beyond the last one.
  PRCL_HOST_DEVICE T position(T i) const {
#ifdef __CUDA_ARCH__
    // One rounding wherever this is inlined: a search for an output and that output's own position have to
    // agree.
    const T position = align_corners ? scale * i : fma(scale, i + T(0.5), T(-0.5));
#else
    const T position = align_corners ? scale * i : scale * (i + T(0.5)) - T(0.5);
#endif
    return position < T(0) ? T(0) : position;
  }

  PRCL_HOST_DEVICE Tap<T> tap(int64_t i) const {
    const T at = position(T(i));
    int64_t low = int64_t(at);
    if (low > input - 1) low = input - 1;
    return {low, low < input - 1 ? low + 1 : low, at - T(low)};
  }
};

}  // namespace prcl
