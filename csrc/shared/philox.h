// Philox-4x32-10 and the rules by which ops draw from it: Salmon, Moraes, Dror, Shaw, "Parallel Random
// Numbers: As Easy as 1, 2, 3" (SC 2011). The rules are written in prcl_fast/reference/philox.py and in the
// samplers beside it; every backend follows them, so that indices are equal bit for bit.
#pragma once

#include "shared/host_device.h"

#include <cmath>
#include <cstdint>

namespace prcl::philox {

constexpr uint32_t kAnchors = 1, kNegatives = 2;  // second counter word: what a draw is for
constexpr int64_t kOne = int64_t(1) << 31;        // the weight of a probability of one

struct Words {
  uint32_t w0, w1, w2, w3;
};

// The four words of `element` for seed = (seed, step).
PRCL_HOST_DEVICE Words draw(const int64_t* seed, uint32_t element, uint32_t purpose) {
  uint32_t c0 = element, c1 = purpose, c2 = uint32_t(uint64_t(seed[1])),
           c3 = uint32_t(uint64_t(seed[1]) >> 32);
  uint32_t k0 = uint32_t(uint64_t(seed[0])), k1 = uint32_t(uint64_t(seed[0]) >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// floor((high * 2^32 + low) * n / 2^64) for 0 <= n <= 2^31.
PRCL_HOST_DEVICE int64_t bounded(uint32_t high, uint32_t low, int64_t n) {
  const uint64_t count = uint64_t(n);
  return int64_t((uint64_t(high) * count + ((uint64_t(low) * count) >> 32)) >> 32);
}

// floor(p * 2^31), p clamped to [0, 1], NaN as 0: the integer weight of a class.
PRCL_HOST_DEVICE int64_t weight(double p) {
  return p > 0.0 ? int64_t((p < 1.0 ? p : 1.0) * double(kOne)) : 0;
}

// A standard normal number, by Box and Muller.
PRCL_HOST_DEVICE float normal(const Words& words) {
  constexpr double kUnit = 1.0 / 4294967296.0, kTwoPi = 6.283185307179586477;
  return float(sqrt(-2.0 * log((double(words.w0) + 1.0) * kUnit)) * cos(double(words.w1) * (kTwoPi * kUnit)));
}

}  // namespace prcl::philox
