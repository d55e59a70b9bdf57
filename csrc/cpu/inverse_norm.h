// 1 / |row| of a row of any floating-point type.
#pragma once

#include "cpu/convert.h"
#include "shared/norm.h"

namespace prcl::cpu {

template <int kBytes, class T, class S>
PRCL_INLINE T inverse_norm_of(const S* row, int64_t dims) {
  using V = typename Vector<T, kBytes>::Type;
  constexpr int64_t kLanes = Vector<T, kBytes>::kLanes;
  V sum{};
  int64_t l = 0;
  for (; l + kLanes <= dims; l += kLanes) {
    const V value = load_as<V>(row + l);
    sum += value * value;
  }
  T square = 0;
  for (; l < dims; ++l) square += T(row[l]) * T(row[l]);
  for (int64_t lane = 0; lane < kLanes; ++lane) square += sum[lane];
  return inverse_norm(square);
}

}  // namespace prcl::cpu
