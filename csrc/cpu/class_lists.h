// The pixels of each class as ranges of one list: a counting sort, each class's pixels in ascending order.
#pragma once

#include "labels.h"

#include <vector>

namespace prcl::cpu {

struct ClassLists {
  std::vector<int64_t> start;  // [C + 1]
  std::vector<int32_t> pixel;  // class c owns pixel[start[c]] .. pixel[start[c + 1] - 1]

  int64_t count(int64_t c) const { return start[c + 1] - start[c]; }
};

// `keep(i)` says whether pixel i takes part.
template <class Keep>
ClassLists class_lists(const Labels& labels, int64_t pixels, int64_t num_classes, const Keep& keep) {
  std::vector<int32_t> label(pixels);
  ClassLists lists{std::vector<int64_t>(num_classes + 1), {}};
  for (int64_t i = 0; i < pixels; ++i) {
    label[i] = keep(i) ? labels.at(i, num_classes) : -1;
    if (label[i] >= 0) ++lists.start[label[i] + 1];
  }
  for (int64_t c = 0; c < num_classes; ++c) lists.start[c + 1] += lists.start[c];
  lists.pixel.resize(lists.start[num_classes]);
  std::vector<int64_t> next(lists.start.begin(), lists.start.end() - 1);
  for (int64_t i = 0; i < pixels; ++i) {
    if (label[i] >= 0) lists.pixel[next[label[i]]++] = int32_t(i);
  }
  return lists;
}

}  // namespace prcl::cpu
