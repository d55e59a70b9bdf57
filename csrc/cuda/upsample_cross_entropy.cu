// Cross-entropy of upsampled logits on CUDA: counts the kept pixels, makes loss and gradient with the kernels
// of upsample_cross_entropy_kernels.cuh, and sums the blocks' losses.

#include "cuda/launch.h"
#include "cuda/upsample_cross_entropy_kernels.cuh"

#include <algorithm>
#include <optional>
#include <tuple>

namespace prcl::cuda {
namespace {

using upsample::FloatAxis;
using upsample::Logits;
using upsample::Targets;
using upsample::Tile;

// The tiles with which the fewest threads run. A tile of t input columns is touched by the output columns of
// t + 1 steps between inputs; the kernel copes if there are more of them than threads. High tiles share fewer
// output rows with each other, but there must be blocks enough for every multiprocessor.
Tile tile_for(const FloatAxis& rows, const FloatAxis& columns, int64_t images, int multiprocessors) {
  const double outputs_per_input = double(columns.output) / double(std::max<int64_t>(columns.input - 1, 1));
  Tile best = {16, 1, 0};
  int64_t fewest = INT64_MAX, best_tiles = 1;
  for (int threads = upsample::kMaxTileThreads; threads >= 64; threads -= 32) {
    const auto fitting = int64_t((threads - 2) / outputs_per_input) - 1;
    const int64_t widest = std::clamp<int64_t>(fitting, 1, std::min<int64_t>(threads, columns.input));
    const int64_t tiles = ceil_div(columns.input, widest);
    if (tiles * threads >= fewest) continue;
    fewest = tiles * threads;
    best_tiles = tiles;
    best.columns = int(ceil_div(columns.input, tiles));
    best.threads = threads;
  }
  while (best.rows > 4 && images * best_tiles * ceil_div(rows.input, best.rows) < 4 * multiprocessors) {
    best.rows /= 2;
  }
  return best;
}

template <class S, int K, bool kAll>
Tensor launch_gradient(const OnDeviceOf& device, const Logits<S>& logits, const Targets& targets,
                       const float* log_sum, int64_t images, Tensor& grad) {
  const Tile tile = tile_for(logits.rows, logits.columns, images, device.multiprocessors());
  const int64_t blocks = images * ceil_div(logits.classes, K) * ceil_div(logits.rows.input, tile.rows) *
                         ceil_div(logits.columns.input, tile.columns);
  Tensor partial_loss = empty_like_of(grad, {kAll ? blocks : 0});
  launch(upsample::gradient_kernel<S, K, kAll>, dim3(blocks), dim3(tile.threads), tile.shared_bytes<K>(),
         device.stream(), logits, targets, log_sum, tile, grad.mutable_data_ptr<float>(),
         partial_loss.mutable_data_ptr<float>());
  return partial_loss;
}

// Any number of classes, and every call that wants no gradient.
template <class S>
Tensor launch_statistics(const OnDeviceOf& device, const Logits<S>& logits, const Targets& targets,
                         int64_t images, Tensor& log_sum) {
  const int64_t blocks = images * ceil_div(logits.rows.output, upsample::kStatisticsRows) *
                         ceil_div(logits.columns.output, upsample::kStatisticsThreads);
  Tensor partial_loss = empty_like_of(log_sum, {blocks});
  const size_t waiting = sizeof(upsample::Softmax) * upsample::kStatisticsThreads * upsample::kStatisticsRows;
  launch(upsample::statistics_kernel<S>, dim3(blocks), dim3(upsample::kStatisticsThreads), waiting,
         device.stream(), logits, targets, log_sum.numel() > 0 ? log_sum.mutable_data_ptr<float>() : nullptr,
         partial_loss.mutable_data_ptr<float>());
  return partial_loss;
}

std::tuple<Tensor, Tensor> upsample_cross_entropy(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                                  int64_t ignore_index, bool mean, bool needs_grad) {
  const OnDeviceOf device(logits);
  const auto floats = [&](std::initializer_list<int64_t> size) {
    return torch::stable::empty({size.begin(), size.size()}, ScalarType::Float, std::nullopt,
                                logits.device());
  };
  const int64_t images = logits.size(0), pixels = target.numel();
  Tensor loss = floats({});
  Tensor grad = needs_grad ? floats({images, logits.size(1), logits.size(2), logits.size(3)}) : floats({0});
  const int64_t count_blocks =
      std::min<int64_t>(ceil_div(pixels, 4 * upsample::kCountThreads), 2 * device.multiprocessors());
  Tensor kept = torch::stable::empty({&count_blocks, 1}, ScalarType::Int, std::nullopt, logits.device());
  Targets targets = {target.const_data_ptr(),
                     target.scalar_type() == ScalarType::Byte,
                     ignore_index,
                     weight ? weight->const_data_ptr<float>() : nullptr,
                     weight && weight->dim() == 3,
                     nullptr,
                     int(count_blocks)};
  if (mean) {
    launch(upsample::count_kernel, dim3(count_blocks), dim3(upsample::kCountThreads), 0, device.stream(),
           targets, pixels, kept.mutable_data_ptr<int>());
    targets.kept = kept.const_data_ptr<int>();
  }
  dispatch_storage(logits.scalar_type(), [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    const Logits<S> view = upsample::logits_of<S>(logits, target.size(1), target.size(2));
    const auto run = [&](auto classes) {
      constexpr int kClasses = decltype(classes)::value;
      if constexpr (kClasses > 0) {
        if (needs_grad) {
          return launch_gradient<S, kClasses, true>(device, view, targets, nullptr, images, grad);
        }
      }
      Tensor log_sum = floats({needs_grad ? pixels : 0});
      Tensor partial_loss = launch_statistics(device, view, targets, images, log_sum);
      if (needs_grad) {
        launch_gradient<S, upsample::kChunk, false>(device, view, targets, log_sum.const_data_ptr<float>(),
                                                    images, grad);
      }
      return partial_loss;
    };
    upsample::dispatch_classes(logits.size(1), [&](auto classes) {
      const Tensor partial_loss = run(classes);
      launch(sum_kernel<float>, dim3(1), dim3(kSumThreads), 0, device.stream(),
             partial_loss.const_data_ptr<float>(), partial_loss.numel(), loss.mutable_data_ptr<float>());
    });
  });
  return {loss, grad};
}

}  // namespace
}  // namespace prcl::cuda

PRCL_CUDA_LIBRARY(m) { m.impl("upsample_cross_entropy", TORCH_BOX(&prcl::cuda::upsample_cross_entropy)); }
