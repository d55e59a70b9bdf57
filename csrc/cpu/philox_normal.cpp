// Normal numbers on the CPU.

#include "shared/philox.h"
#include "shared/tensor.h"

#include <torch/csrc/stable/library.h>

namespace prcl::cpu {
namespace {

Tensor philox_normal(Tensor seed, int64_t count, int64_t purpose) {
  Tensor result = empty_like_of(seed, {count}, ScalarType::Float);
  const int64_t* key = seed.const_data_ptr<int64_t>();
  float* to = result.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      to[i] = philox::normal(philox::draw(key, uint32_t(i), uint32_t(purpose)));
    }
  });
  return result;
}

}  // namespace
}  // namespace prcl::cpu

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CPU, m) {
  m.impl("philox_normal", TORCH_BOX(&prcl::cpu::philox_normal));
}
