// Chooses at run time the widest vector instructions that this processor has.
//
// A kernel is a struct with `template <int kBytes> static void run(const Args&)`, always inlined, written
// with GCC's vector types of kBytes; `dispatch<Kernel>(args)` runs the copy compiled for the chosen
// instruction set. The environment variable PRCL_CPU_ISA (avx512, avx2 or baseline) lowers the choice.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#define PRCL_INLINE inline __attribute__((always_inline))

namespace prcl::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa isa();  // the same for the whole process

// The kBytes of the kernels that `dispatch` runs.
inline int64_t vector_bytes() { return isa() == Isa::kAvx512 ? 64 : isa() == Isa::kAvx2 ? 32 : 16; }

// T repeated to fill kBytes, its bits as integers, and the layout of T's bits.
template <class T, int kBytes>
struct Vector;

template <int kBytes>
struct Vector<float, kBytes> {
  typedef float Type __attribute__((vector_size(kBytes)));
  typedef int32_t Bits __attribute__((vector_size(kBytes)));
  static constexpr int kLanes = kBytes / 4;
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kMantissaMask = 0x007fffff;
  static constexpr int32_t kOne = 0x3f800000;
  static constexpr int32_t kBias = 127;
};

template <int kBytes>
struct Vector<double, kBytes> {
  typedef double Type __attribute__((vector_size(kBytes)));
  typedef int64_t Bits __attribute__((vector_size(kBytes)));
  static constexpr int kLanes = kBytes / 8;
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kMantissaMask = 0x000fffffffffffff;
  static constexpr int64_t kOne = 0x3ff0000000000000;
  static constexpr int64_t kBias = 1023;
};

template <class V, class T>
PRCL_INLINE V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V, class T>
PRCL_INLINE void store(T* to, const V& value) {
  std::memcpy(to, &value, sizeof(V));
}

// All lanes combined into one, halves first: f(f(lane 0, lane 4), ...) and so on.
template <class T, class V, class F>
PRCL_INLINE T combine(V value, const F& f) {
  if constexpr (sizeof(V) <= 16) {
    T lanes[sizeof(V) / sizeof(T)];
    store(lanes, value);
    if constexpr (sizeof(V) == 2 * sizeof(T))
      return f(lanes[0], lanes[1]);
    else
      return f(f(lanes[0], lanes[1]), f(lanes[2], lanes[3]));
  } else {
    typedef T Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    store(halves, value);
    return combine<T>(Half(f(halves[0], halves[1])), f);
  }
}

#if defined(__x86_64__)
template <class Kernel, class Args>
__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512"))) void
run_avx512(const Args& args) {
  Kernel::template run<64>(args);
}

template <class Kernel, class Args>
__attribute__((target("avx2,fma"))) void run_avx2(const Args& args) {
  Kernel::template run<32>(args);
}
#endif

template <class Kernel, class Args>
void run_baseline(const Args& args) {
  Kernel::template run<16>(args);
}

template <class Kernel, class Args>
void dispatch(const Args& args) {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return run_avx512<Kernel>(args);
  if (isa() == Isa::kAvx2) return run_avx2<Kernel>(args);
#endif
  run_baseline<Kernel>(args);
}

}  // namespace prcl::cpu
