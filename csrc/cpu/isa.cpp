#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

namespace prcl::cpu {
namespace {

Isa detect() {
  Isa best = Isa::kBaseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::kAvx2;
  if (best == Isa::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
    best = Isa::kAvx512;
  }
#endif
  const char* variable = std::getenv("PRCL_CPU_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  if (wanted == "baseline") return Isa::kBaseline;
  if (wanted == "avx2" && best == Isa::kAvx512) return Isa::kAvx2;
  return best;
}

std::string cpu_isa() {
  switch (isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

}  // namespace prcl::cpu

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&prcl::cpu::cpu_isa));
}
