// 1 / x of a vector. A division of 16 floats takes as long as fifteen other operations; the processor's
// estimate of 14 bits with one Newton step takes three and is off by one unit in the last place at most, for
// 2^-126 < x < 2^126. Other vectors divide.
#pragma once

#include "cpu/isa.h"

namespace prcl::cpu {

template <class V>
PRCL_INLINE V reciprocal(V x) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<V, typename Vector<float, 64>::Type>) {
    V r;
    asm("vrcp14ps %1, %0" : "=v"(r) : "v"(x));
    return r + r * (1.0f - x * r);
  }
#endif
  return 1 / x;
}

}  // namespace prcl::cpu
