// Anchors on the CPU: one draw for each from the class lists of the hard pixels.

#include "shared/philox.h"
#include "shared/tensor.h"

#include <torch/csrc/stable/library.h>

namespace prcl::cpu {
namespace {

Tensor sample_anchors(Tensor order, Tensor start, int64_t num_anchors, Tensor seed) {
  const int64_t num_classes = start.numel() - 1;
  Tensor index = empty_like_of(seed, {num_classes, num_anchors});
  const int32_t *pixels = order.const_data_ptr<int32_t>(), *starts = start.const_data_ptr<int32_t>();
  const int64_t* key = seed.const_data_ptr<int64_t>();
  int64_t* to = index.mutable_data_ptr<int64_t>();
  for (int64_t c = 0; c < num_classes; ++c) {
    const int64_t count = starts[c + 1] - starts[c];
    for (int64_t a = 0; a < num_anchors; ++a) {
      const int64_t element = c * num_anchors + a;
      const philox::Words words = philox::draw(key, uint32_t(element), philox::kAnchors);
      const int64_t drawn = starts[c] + philox::bounded(words.w0, words.w1, count);
      to[element] = count > 0 ? pixels[drawn] : -1;
    }
  }
  return index;
}

}  // namespace
}  // namespace prcl::cpu

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CPU, m) {
  m.impl("sample_anchors", TORCH_BOX(&prcl::cpu::sample_anchors));
}
