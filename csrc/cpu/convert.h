// Reads and writes vectors of float or double in memory of any floating-point type.
#pragma once

#include "cpu/isa.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace prcl::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Vectors of as many 16-bit integers as V has lanes.
template <int kLanes>
struct Narrow {
  typedef uint16_t Type __attribute__((vector_size(kLanes * 2)));
};

template <class V, class T>
PRCL_INLINE V load_as(const T* from) {
  return load<V>(from);
}

template <class V>
PRCL_INLINE V load_as(const BFloat16* from) {
  constexpr int kLanes = sizeof(V) / sizeof(float);
  using Bits = typename Vector<float, sizeof(V)>::Bits;
  const auto narrow = load<typename Narrow<kLanes>::Type>(from);
  return (V)(__builtin_convertvector(narrow, Bits) << 16);
}

// The exponent is moved by a multiplication, which is exact and right for subnormal numbers; infinity and NaN
// keep theirs.
template <class V>
PRCL_INLINE V load_as(const Half* from) {
  constexpr int kLanes = sizeof(V) / sizeof(float);
  using Bits = typename Vector<float, sizeof(V)>::Bits;
  const Bits bits = __builtin_convertvector(load<typename Narrow<kLanes>::Type>(from), Bits);
  const Bits magnitude = bits & 0x7fff;
  const V scaled = (V)(magnitude << 13) * 0x1p112f;
  const Bits special = (magnitude >= 0x7c00) & 0x7f800000;
  return (V)((Bits)scaled | special | ((bits & 0x8000) << 16));
}

template <class V, class T>
PRCL_INLINE void store_as(T* to, const V& value) {
  store(to, value);
}

// To the nearest, to even between two.
template <class V>
PRCL_INLINE void store_as(BFloat16* to, const V& value) {
  constexpr int kLanes = sizeof(V) / sizeof(float);
  typedef uint32_t Words __attribute__((vector_size(sizeof(V))));
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words word = value == value ? rounded : Words{} + 0x7fc0;
  store(to, __builtin_convertvector(word, typename Narrow<kLanes>::Type));
}

template <class V>
PRCL_INLINE void store_as(Half* to, const V& value) {
  constexpr int kLanes = sizeof(V) / sizeof(float);
  float lanes[kLanes];
  store(lanes, value);
  for (int i = 0; i < kLanes; ++i) to[i] = Half(lanes[i]);
}

// The first `count` lanes, at least one; the others are zero, and are not written.
template <class V, class S>
PRCL_INLINE V load_lanes(const S* from, int64_t count) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(V{}[0]);
  if (count == kLanes) return load_as<V>(from);
  S part[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) part[i] = i < count ? from[i] : S(0);
  return load_as<V>(part);
}

template <class V, class S>
PRCL_INLINE void store_lanes(S* to, int64_t count, const V& value) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(V{}[0]);
  if (count == kLanes) return store_as(to, value);
  S part[kLanes];
  store_as(part, value);
  for (int64_t i = 0; i < count; ++i) to[i] = part[i];
}

// Converts `count` values; the rest up to `width`, a multiple of the vector's lanes, is `fill`.
template <class V, class T, class S>
PRCL_INLINE void convert_row(const S* from, int64_t count, T fill, int64_t width, T* to) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(T);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load_as<V>(from + i));
  for (; i < count; ++i) to[i] = T(from[i]);
  for (; i < width; ++i) to[i] = fill;
}

}  // namespace prcl::cpu
