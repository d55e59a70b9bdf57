// Rows of float32, bfloat16 or float16 values, read and written 16 bytes at a time and computed with as
// float32.
//
// A Vector holds kVector<S> consecutive values as they lie in memory, so that several loads can be in flight
// before the first conversion. The masked load is for rows that are not a multiple of 16 bytes long or do not
// start at one: values past the row's end are `fill`.
#pragma once

#include <cuda_runtime.h>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace prcl::cuda {

using c10::BFloat16;
using c10::Half;

constexpr int kVectorBytes = 16;
template <class S>
constexpr int kVector = kVectorBytes / int(sizeof(S));

template <class S>
struct Vector {
  uint4 bits;
};

// Whether every row of `dims` values starts and ends at a multiple of 16 bytes.
template <class S>
bool rows_are_aligned(const S* first, int64_t dims) {
  return dims % kVector<S> == 0 && reinterpret_cast<uintptr_t>(first) % kVectorBytes == 0;
}

template <class S>
__device__ __forceinline__ Vector<S> load(const S* aligned) {
  return {__ldg(reinterpret_cast<const uint4*>(aligned))};
}

namespace detail {

__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ uint32_t bits_of(BFloat16 value) { return value.x; }
__device__ __forceinline__ uint32_t bits_of(Half value) { return value.x; }

// The 32-bit word number i of a vector, from single values.
template <class S>
__device__ __forceinline__ uint32_t masked_word(const S* from, int i, int64_t count, S fill) {
  constexpr int kPerWord = 4 / int(sizeof(S));
  uint32_t word = 0;
#pragma unroll
  for (int j = 0; j < kPerWord; ++j) {
    const int k = i * kPerWord + j;
    word |= bits_of(k < count ? from[k] : fill) << (j * 8 * int(sizeof(S)) % 32);
  }
  return word;
}

}  // namespace detail

// The first `count` values, which may be none, and `fill` after them; any alignment.
template <class S>
__device__ __forceinline__ Vector<S> load_masked(const S* from, int64_t count, float fill) {
  const S last = S(fill);
  return {make_uint4(detail::masked_word(from, 0, count, last), detail::masked_word(from, 1, count, last),
                     detail::masked_word(from, 2, count, last), detail::masked_word(from, 3, count, last))};
}

template <class S>
__device__ __forceinline__ Vector<S> load(const S* from, int64_t count, float fill, bool aligned) {
  return aligned && count >= kVector<S> ? load(from) : load_masked(from, count, fill);
}

__device__ __forceinline__ void unpack(const Vector<float>& vector, float (&to)[4]) {
  to[0] = __uint_as_float(vector.bits.x);
  to[1] = __uint_as_float(vector.bits.y);
  to[2] = __uint_as_float(vector.bits.z);
  to[3] = __uint_as_float(vector.bits.w);
}

// A bfloat16 is the upper half of a float32.
__device__ __forceinline__ void unpack(const Vector<BFloat16>& vector, float (&to)[8]) {
  const uint32_t words[4] = {vector.bits.x, vector.bits.y, vector.bits.z, vector.bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
  }
}

__device__ __forceinline__ void unpack(const Vector<Half>& vector, float (&to)[8]) {
  const uint32_t words[4] = {vector.bits.x, vector.bits.y, vector.bits.z, vector.bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = float(Half(uint16_t(words[i]), Half::from_bits()));
    to[2 * i + 1] = float(Half(uint16_t(words[i] >> 16), Half::from_bits()));
  }
}

// kCount consecutive values in as many vectors as hold them: rows of different types in equal pieces.
template <class S, int kCount>
struct Values {
  static_assert(kCount % kVector<S> == 0, "values fill whole vectors");
  Vector<S> part[kCount / kVector<S>];
};

// The values of which the first `count`, which may be none, are read, and `fill` after them. `kAligned`: all
// of them are there, from a multiple of 16 bytes on.
template <int kCount, bool kAligned, class S>
__device__ __forceinline__ Values<S, kCount> load_values(const S* from, int64_t count, float fill) {
  Values<S, kCount> values;
#pragma unroll
  for (int i = 0; i < kCount; i += kVector<S>) {
    values.part[i / kVector<S>] = kAligned ? load(from + i) : load_masked(from + i, count - i, fill);
  }
  return values;
}

template <class S, int kCount>
__device__ __forceinline__ void unpack(const Values<S, kCount>& values, float (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += kVector<S>) {
    float some[kVector<S>];
    unpack(values.part[i / kVector<S>], some);
#pragma unroll
    for (int j = 0; j < kVector<S>; ++j) to[i + j] = some[j];
  }
}

// The inverse of unpack; rounds to the nearest.
template <class S>
__device__ __forceinline__ Vector<S> pack(const float (&from)[kVector<S>]) {
  constexpr int kPerWord = 4 / int(sizeof(S));
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kVector<S>; ++i) {
    words[i / kPerWord] |= detail::bits_of(S(from[i])) << (i % kPerWord * 8 * int(sizeof(S)) % 32);
  }
  return {make_uint4(words[0], words[1], words[2], words[3])};
}

template <class S>
__device__ __forceinline__ void store(S* aligned, const Vector<S>& vector) {
  *reinterpret_cast<uint4*>(aligned) = vector.bits;
}

}  // namespace prcl::cuda
