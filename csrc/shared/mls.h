// Mutual likelihood score: the arithmetic that CPU and CUDA kernels share.
//
// The score of rows i and j over D dimensions is -1/2 (Q + L) + constant, with s_l = var_i + var_j clamped at
// kMinVariance,
//   Q = sum_l (mu_i - mu_j)^2 / s_l,   L = sum_l log s_l.
// Two dimensions share one denominator p = s_0 s_1: their part of Q is (d_0^2 s_1 + d_1^2 s_0) / p, and log p
// is their part of L. Variances are therefore cut at kMaxVariance, so that p neither underflows nor
// overflows; where a row has an infinite variance the score is minus infinity, which the kernels write at the
// end.
#pragma once

#include "shared/constants.h"

#include <cstdint>

namespace prcl::mls {

constexpr double kLogTwoPi = 1.8378770664093454836;

// score = scale * (Q + L) + offset; the mean divides by D and drops the constant.
template <class T>
struct Affine {
  T scale;
  T offset;
  Affine(int64_t dims, bool mean)
      : scale(T(mean ? -0.5 / double(dims) : -0.5)),
        offset(T(mean ? 0.0 : -0.5 * double(dims) * kLogTwoPi)) {}
};

// The factor of the gradient of the scores: d score / d (Q + L) times -2.
inline double gradient_scale(int64_t dims, bool mean) { return mean ? 1.0 / double(dims) : 1.0; }

}  // namespace prcl::mls
