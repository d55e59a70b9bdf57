// The pixels of each class as ranges of one list, on the device.
#pragma once

#include "cuda/launch.h"

namespace prcl::cuda {

struct ClassList {
  Tensor order;  // int32 [pixels]: flat pixel indices, sorted by class, ascending within a class; then -1
  Tensor start;  // int32 [C + 1]: class c owns order[start[c]] .. order[start[c + 1] - 1]
};

struct ClassLists {
  ClassList valid, hard;
};

// Of the pixels that are valid, and of those that are hard too, whose label is in 0 .. num_classes - 1. label
// is contiguous of any integer type; valid and hard are contiguous bool tensors of its shape.
ClassLists class_lists(const OnDeviceOf& device, const Tensor& label, const Tensor& valid, const Tensor& hard,
                       int64_t num_classes);

}  // namespace prcl::cuda
