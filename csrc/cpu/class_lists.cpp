// Class lists on the CPU: one counting sort for the valid pixels and for the hard ones among them, each
// class's pixels in ascending order.

#include "shared/labels.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

namespace prcl::cpu {
namespace {

// One of the lists while it is written.
struct List {
  List(const Tensor& label, int64_t num_classes)
      : order(empty_like_of(label, {label.numel()}, ScalarType::Int)),
        start(empty_like_of(label, {num_classes + 1}, ScalarType::Int)),
        next(num_classes) {}

  void find_places() {
    int32_t* const starts = start.mutable_data_ptr<int32_t>();
    starts[0] = 0;
    std::partial_sum(next.begin(), next.end(), starts + 1);
    std::copy_n(starts, next.size(), next.begin());
    int32_t* const places = order.mutable_data_ptr<int32_t>();
    std::fill(places + starts[next.size()], places + order.numel(), -1);
  }

  Tensor order, start;
  std::vector<int32_t> next;  // the pixels of each class, then the place of the class's next pixel
};

std::tuple<Tensor, Tensor, Tensor, Tensor> class_lists(Tensor label, Tensor valid, Tensor hard,
                                                       int64_t num_classes) {
  const int64_t pixels = label.numel();
  const Labels labels = labels_of(label);
  const bool *is_valid = valid.const_data_ptr<bool>(), *is_hard = hard.const_data_ptr<bool>();
  std::vector<int32_t> class_of(pixels);
  List of_valid(label, num_classes), of_hard(label, num_classes);
  for (int64_t i = 0; i < pixels; ++i) {
    const int32_t c = class_of[i] = is_valid[i] ? labels.at(i, num_classes) : -1;
    if (c < 0) continue;
    ++of_valid.next[c];
    of_hard.next[c] += is_hard[i];
  }
  of_valid.find_places();
  of_hard.find_places();
  int32_t* const valid_order = of_valid.order.mutable_data_ptr<int32_t>();
  int32_t* const hard_order = of_hard.order.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < pixels; ++i) {
    const int32_t c = class_of[i];
    if (c < 0) continue;
    valid_order[of_valid.next[c]++] = int32_t(i);
    if (is_hard[i]) hard_order[of_hard.next[c]++] = int32_t(i);
  }
  return {of_valid.order, of_valid.start, of_hard.order, of_hard.start};
}

}  // namespace
}  // namespace prcl::cpu

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CPU, m) {
  m.impl("class_lists", TORCH_BOX(&prcl::cpu::class_lists));
}
