// The pixels of each class as ranges of one list, on the device.
#pragma once

#include "cuda/launch.h"

namespace prcl::cuda {

struct ClassLists {
  Tensor order;  // int32 [pixels]: flat pixel indices, sorted by class, ascending within a class
  Tensor start;  // int32 [C + 1]: class c owns order[start[c]] .. order[start[c + 1] - 1]
};

// Of the pixels with keep (and, where it is given, also_keep) whose label is in 0 .. num_classes - 1. label
// is contiguous of any integer type; keep and also_keep are contiguous bool tensors of its shape.
ClassLists class_lists(const OnDeviceOf& device, const Tensor& label, const Tensor& keep,
                       const Tensor* also_keep, int64_t num_classes);

}  // namespace prcl::cuda
