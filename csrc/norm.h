// The norm of a mean, as the score divides by it: never below kMinNorm.
#pragma once

#include "host_device.h"

#include <cmath>

namespace prcl {

constexpr double kMinNorm = 1e-12;  // MIN_NORM of prcl_fast/reference/norm.py

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
