// Integer label maps of any width, read one pixel at a time.
#pragma once

#include "shared/host_device.h"
#include "shared/tensor.h"

namespace prcl {

struct Labels {
  const void* data;
  ScalarType type;

  // The label of pixel i, or -1 where it is outside 0 .. num_classes - 1.
  PRCL_HOST_DEVICE int at(int64_t i, int64_t num_classes) const {
    int64_t label;
    switch (type) {
      case ScalarType::Byte:
        label = static_cast<const uint8_t*>(data)[i];
        break;
      case ScalarType::Char:
        label = static_cast<const int8_t*>(data)[i];
        break;
      case ScalarType::Short:
        label = static_cast<const int16_t*>(data)[i];
        break;
      case ScalarType::Int:
        label = static_cast<const int32_t*>(data)[i];
        break;
      default:
        label = static_cast<const int64_t*>(data)[i];
    }
    return label >= 0 && label < num_classes ? int(label) : -1;
  }
};

// `label` must be contiguous and live as long as the result is used.
inline Labels labels_of(const Tensor& label) { return {label.const_data_ptr(), label.scalar_type()}; }

}  // namespace prcl
