// CUDA's keywords, vector types and device functions, those that the sources use, for the CPU.
#pragma once

#include <math.h>

#include <type_traits>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
// The default of a parameter: where a barrier or a collective is called.
#define PRCL_HERE prcl::emulation::Place place = prcl::emulation::Place::here()

using cudaStream_t = void*;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace prcl::emulation {

template <class To, class From>
To bits(From from) {
  static_assert(std::is_trivially_copyable<From>::value && sizeof(From) <= 8 && sizeof(To) <= 8,
                "8 bytes at most");
  To to{};
  memcpy(&to, &from, std::min(sizeof(To), sizeof(From)));
  return to;
}

// The value of lane `from` of the caller's segment of `width` lanes; the caller's own where it lies outside.
template <class T>
T shuffle(unsigned mask, T value, int from, int width, bool wraps, Place place) {
  const int first = lane() / width * width;
  if (wraps) from = first + ((from % width) + width) % width;
  if (from < first || from >= first + width) from = lane();
  return bits<T>(exchange(mask, bits<uint64_t>(value), place).received[from]);
}

// The lanes of the mask whose value satisfies the condition.
template <class Condition>
unsigned vote(unsigned mask, uint64_t value, Place place, const Condition& condition) {
  const Fiber& all = exchange(mask, value, place);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    if (all.present >> i & 1 && condition(all.received[i])) result |= 1u << i;
  }
  return result;
}

inline bool not_zero(uint64_t value) { return value != 0; }

}  // namespace prcl::emulation

inline void __syncthreads(PRCL_HERE) { prcl::emulation::barrier(false, place); }
inline int __syncthreads_count(int predicate, PRCL_HERE) {
  return prcl::emulation::barrier(predicate != 0, place);
}
inline int __syncthreads_or(int predicate, PRCL_HERE) {
  return prcl::emulation::barrier(predicate != 0, place) > 0;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF, PRCL_HERE) { prcl::emulation::exchange(mask, 0, place); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, PRCL_HERE) {
  return prcl::emulation::shuffle(mask, value, from, width, true, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, PRCL_HERE) {
  return prcl::emulation::shuffle(mask, value, prcl::emulation::lane() - int(by), width, false, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, PRCL_HERE) {
  return prcl::emulation::shuffle(mask, value, prcl::emulation::lane() + int(by), width, false, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, PRCL_HERE) {
  return prcl::emulation::shuffle(mask, value, prcl::emulation::lane() ^ with, width, false, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, PRCL_HERE) {
  return prcl::emulation::vote(mask, predicate != 0, place, prcl::emulation::not_zero);
}
inline int __any_sync(unsigned mask, int predicate, PRCL_HERE) {
  return __ballot_sync(mask, predicate, place) != 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, PRCL_HERE) {
  const uint64_t mine = prcl::emulation::bits<uint64_t>(value);
  return prcl::emulation::vote(mask, mine, place, [mine](uint64_t other) { return other == mine; });
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, PRCL_HERE) {
  const prcl::emulation::Fiber& all =
      prcl::emulation::exchange(mask, prcl::emulation::bits<uint64_t>(value), place);
  T sum = 0;
  for (int i = 0; i < 32; ++i) {
    if (all.present >> i & 1) sum += prcl::emulation::bits<T>(all.received[i]);
  }
  return sum;
}

template <class T>
T atomicAdd(T* at, T value) {
  static_assert(std::is_integral<T>::value, "sums of floats in the order of arrival are not deterministic");
  const T old = *at;
  *at = T(old + value);
  return old;
}

template <class T>
T __ldg(const T* from) {
  return *from;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(unsigned x) { return prcl::emulation::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return prcl::emulation::bits<unsigned>(x); }

// Exact where the device's are approximate.
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __log2f(float x) { return log2f(x); }
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
