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

  PRCL_HOST_DEVICE Tap<T> tap(int64_t i) const {
#ifdef __CUDA_ARCH__
    // One rounding wherever this is inlined: a search for an output and that output's own position have to
    // agree.
    T position = align_corners ? scale * T(i) : fma(scale, T(i) + T(0.5), T(-0.5));
#else
    T position = align_corners ? scale * T(i) : scale * (T(i) + T(0.5)) - T(0.5);
#endif
    if (position < T(0)) position = T(0);
    int64_t low = int64_t(position);
    if (low > input - 1) low = input - 1;
    return {low, low < input - 1 ? low + 1 : low, position - T(low)};
  }
};

}  // namespace prcl
