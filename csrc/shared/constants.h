// Constants that CPU code and CUDA kernels share.
#pragma once

namespace prcl {

constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2E = 1.4426950408889634074;
constexpr double kMinNorm = 1e-12;      // a mean's norm is never taken below it
constexpr double kMinVariance = 1e-12;  // a sum s_i + s_j is clamped here and has no gradient where it was
constexpr double kMaxVariance = 1e18;
constexpr double kVarianceFloor = 1e-6;  // f of the probability head's sigmoid

}  // namespace prcl
