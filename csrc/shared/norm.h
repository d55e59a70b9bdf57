// The norm of a mean, as the score divides by it: never below kMinNorm.
#pragma once

#include "shared/constants.h"
#include "shared/host_device.h"

#include <cmath>

namespace prcl {

// From the sum of squares.
template <class T>
PRCL_HOST_DEVICE T inverse_norm(T square) {
  const T norm = std::sqrt(square);
  return T(1) / (norm < T(kMinNorm) ? T(kMinNorm) : norm);
}

// Below the clamp the norm counts as a constant: it has no derivative.
template <class T>
PRCL_HOST_DEVICE bool norm_is_clamped(T inverse_norm) {
  return inverse_norm >= T(1) / T(kMinNorm);
}

}  // namespace prcl
