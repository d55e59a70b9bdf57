// Bilinear interpolation of one axis as torch.nn.functional.interpolate does with aligned corners.
#pragma once

#include "shared/host_device.h"

#include <cstdint>
#include <type_traits>

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

  Axis(int64_t input_size, int64_t output_size)
      : input(input_size), output(output_size), scale(output > 1 ? T(input - 1) / T(output - 1) : T(0)) {}

  // Position of output i, in inputs; it may lie beyond the last one by a rounding.
  PRCL_HOST_DEVICE T position(T i) const {
#ifdef __CUDA_ARCH__
    // No fused multiply-add wherever this is inlined: a search for an output and that output's own position
    // have to agree.
    static_assert(std::is_same_v<T, float>, "kernels interpolate in float");
    return __fmul_rn(scale, i);
#else
    return scale * i;
#endif
  }

  PRCL_HOST_DEVICE Tap<T> tap(int64_t i) const {
    const T at = position(T(i));
    int64_t low = int64_t(at);
    if (low > input - 1) low = input - 1;
    return {low, low < input - 1 ? low + 1 : low, at - T(low)};
  }
};

}  // namespace prcl
