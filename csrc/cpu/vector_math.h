// Logarithm, power of two and permutation of GCC's vectors, for float and double. Their error is a few
// roundings of the type; the series are Taylor's, cut where the next term is below the rounding.
#pragma once

#include "cpu/isa.h"
#include "shared/constants.h"

namespace prcl::cpu {

// Splits positive `value` into a mantissa in [1, 2), returned, and its biased exponent, added to `exponent`.
template <class Traits>
PRCL_INLINE typename Traits::Type split(typename Traits::Type value, typename Traits::Bits& exponent) {
  const auto bits = (typename Traits::Bits)value;
  exponent += bits >> Traits::kMantissaBits;
  return (typename Traits::Type)((bits & Traits::kMantissaMask) | Traits::kOne);
}

// log(mantissa * 2^exponent) for a mantissa in [1, 2): 2 atanh((m - 1) / (m + 1)) with m moved to
// [0.707, 1.414], whose series ends where its next term is below the type's rounding.
template <class T, class Traits>
PRCL_INLINE typename Traits::Type log_of(typename Traits::Type mantissa, typename Traits::Bits exponent) {
  using V = typename Traits::Type;
  const auto high = mantissa > T(1.41421356237309505);
  const V m = high ? mantissa * T(0.5) : mantissa;
  const V e = __builtin_convertvector(exponent - (typename Traits::Bits)high, V);  // a true lane is -1
  const V z = (m - T(1)) / (m + T(1));
  const V z2 = z * z;
  constexpr int kTerms = sizeof(T) == 4 ? 5 : 11;
  V series = z2 * T(0) + T(1) / T(2 * kTerms - 1);
  for (int k = kTerms - 2; k >= 0; --k) series = series * z2 + T(1) / T(2 * k + 1);
  return T(2) * z * series + e * T(kLn2);
}

// log(x) for x positive and not subnormal.
template <class T, class Traits>
PRCL_INLINE typename Traits::Type log(typename Traits::Type x) {
  typename Traits::Bits exponent{};
  const typename Traits::Type mantissa = split<Traits>(x, exponent);
  return log_of<T, Traits>(mantissa, exponent - Traits::kBias);
}

// 2^x for x below the largest exponent: 0 where that would be subnormal, NaN for NaN. The integer nearest to
// x moves into the exponent, and the series of 2^f is taken at the rest, |f| <= 1/2.
template <class T, class Traits>
PRCL_INLINE typename Traits::Type exp2(typename Traits::Type x) {
  using V = typename Traits::Type;
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  typedef Word Words __attribute__((vector_size(sizeof(V))));  // unsigned: far below zero the sum wraps
  // log(2)^k / k!
  constexpr double kCoefficients[] = {1.0,
                                      0.69314718055994531,
                                      0.24022650695910071,
                                      0.055504108664821580,
                                      0.0096181291076284772,
                                      0.0013333558146428443,
                                      1.5403530393381609e-4,
                                      1.5252733804059840e-5,
                                      1.3215486790144309e-6,
                                      1.0178086009239700e-7,
                                      7.0549116208011233e-9,
                                      4.4455382718708115e-10,
                                      2.5678435993488205e-11,
                                      1.3691488853904128e-12};
  constexpr int kDegree = sizeof(T) == 4 ? 7 : 13;
  // A sum with 1.5 * 2^kMantissaBits has no bits left for a fraction, and the integer in its lowest bits.
  constexpr T kShift = T(1.5) * T(int64_t(1) << Traits::kMantissaBits);
  const V shifted = x + kShift;
  const V f = x - (shifted - kShift);
  V series = f * T(kCoefficients[kDegree]) + T(kCoefficients[kDegree - 1]);
  for (int k = kDegree - 2; k >= 0; --k) series = series * f + T(kCoefficients[k]);
  const V value = (V)((Words)series + ((Words)shifted << Traits::kMantissaBits));
  // Beside a NaN's own bits the sum could be a number.
  return x < T(1 - Traits::kBias) ? V{} : (x == x ? value : x);
}

// Lane i of the result is value[index[i] modulo the number of lanes].
template <class V, class Index>
PRCL_INLINE V permute(V value, Index index) {
#ifdef __clang__
  constexpr unsigned kLanes = sizeof(V) / sizeof(value[0]);
  V permuted;
  for (unsigned i = 0; i < kLanes; ++i) permuted[i] = value[index[i] % kLanes];
  return permuted;
#else
  return __builtin_shuffle(value, index);
#endif
}

}  // namespace prcl::cpu
