// Pseudo-labels on CUDA: argmax and maximum of the softmax of upsampled logits.
//
// A block owns a strip of kRows output rows and kThreads columns of one image; see upsampling.cuh for
// how a thread walks down its column. It writes one byte and one float a pixel. Nothing is summed between
// threads.

#include "cuda/launch.h"
#include "cuda/upsampling.cuh"

#include <tuple>

namespace prcl::cuda {
namespace {

using upsample::Softmax;

constexpr int kThreads = 128, kRows = 16;

// K: the number of classes, or 0 for any.
template <class S, int K>
__global__ void __launch_bounds__(kThreads, 4)
    pseudo_label_kernel(upsample::Logits<S> logits, uint8_t* label, float* confidence) {
  const int height = int(logits.rows.output), width = int(logits.columns.output);
  const int tiles = (width + kThreads - 1) / kThreads, strips = (height + kRows - 1) / kRows;
  const int column = int(blockIdx.x) % tiles * kThreads + int(threadIdx.x);
  const int image = int(blockIdx.x) / tiles / strips, first = int(blockIdx.x) / tiles % strips * kRows;
  const int last = min(first + kRows, height);
  Softmax* waiting = K > 0 ? nullptr : dynamic_shared<Softmax>() + threadIdx.x;
  upsample::walk<S, (K > 0 ? K : upsample::kChunk), (K > 0)>(
      logits, image, upsample::position_of(logits.columns, min(column, width - 1)), first, last, waiting,
      kThreads, [&](int row, const upsample::Position&, const Softmax& softmax) {
        if (column >= width) return;
        const int64_t pixel = (int64_t(image) * height + row) * width + column;
        label[pixel] = uint8_t(softmax.argmax);
        confidence[pixel] = approximate_reciprocal(softmax.sum);
      });
}

std::tuple<Tensor, Tensor> pseudo_label(Tensor logits, int64_t height, int64_t width) {
  const OnDeviceOf device(logits);
  const int64_t size[] = {logits.size(0), height, width};
  const auto result = [&](ScalarType type) {
    return torch::stable::empty({size, 3}, type, std::nullopt, logits.device());
  };
  Tensor label = result(ScalarType::Byte), confidence = result(ScalarType::Float);
  dispatch_storage(logits.scalar_type(), [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    upsample::dispatch_classes(logits.size(1), [&](auto classes) {
      constexpr int kClasses = decltype(classes)::value;
      const size_t waiting = kClasses > 0 ? 0 : sizeof(Softmax) * kThreads * kRows;
      launch(pseudo_label_kernel<S, kClasses>,
             dim3(logits.size(0) * ceil_div(height, kRows) * ceil_div(width, kThreads)), dim3(kThreads),
             waiting, device.stream(), upsample::logits_of<S>(logits, height, width),
             label.mutable_data_ptr<uint8_t>(), confidence.mutable_data_ptr<float>());
    });
  });
  return {label, confidence};
}

}  // namespace
}  // namespace prcl::cuda

PRCL_CUDA_LIBRARY(m) { m.impl("pseudo_label", TORCH_BOX(&prcl::cuda::pseudo_label)); }
