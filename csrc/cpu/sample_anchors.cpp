// Anchors on the CPU: one counting sort, then one draw for each.

#include "cpu/class_lists.h"
#include "philox.h"

#include <torch/csrc/stable/library.h>

namespace prcl::cpu {
namespace {

Tensor sample_anchors(Tensor label, Tensor valid, Tensor hard, int64_t num_classes, int64_t num_anchors,
                      Tensor seed) {
  Tensor index = empty_like_of(seed, {num_classes, num_anchors});
  const bool *is_valid = valid.const_data_ptr<bool>(), *is_hard = hard.const_data_ptr<bool>();
  const ClassLists lists = class_lists(labels_of(label), label.numel(), num_classes,
                                       [=](int64_t i) { return is_valid[i] && is_hard[i]; });
  const int64_t* key = seed.const_data_ptr<int64_t>();
  int64_t* to = index.mutable_data_ptr<int64_t>();
  for (int64_t c = 0; c < num_classes; ++c) {
    const int64_t count = lists.count(c);
    for (int64_t a = 0; a < num_anchors; ++a) {
      const int64_t element = c * num_anchors + a;
      const philox::Words words = philox::draw(key, uint32_t(element), philox::kAnchors);
      const int64_t drawn = lists.start[c] + philox::bounded(words.w0, words.w1, count);
      to[element] = count > 0 ? lists.pixel[drawn] : -1;
    }
  }
  return index;
}

}  // namespace
}  // namespace prcl::cpu

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CPU, m) {
  m.impl("sample_anchors", TORCH_BOX(&prcl::cpu::sample_anchors));
}
