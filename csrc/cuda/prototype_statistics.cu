// Prototype statistics on CUDA: the class lists, where they are not given, then the kernels of
// prototype_statistics_kernels.cuh. mu, var [B, D, h, w], both channels_last or both contiguous, in the types
// of dispatch_feature_storage.

#include "cuda/class_lists.h"
#include "cuda/prototype_statistics_kernels.cuh"
#include "cuda/storage.h"

#include <algorithm>
#include <optional>
#include <tuple>

namespace prcl::cuda {
namespace {

namespace kernels = prototype;

constexpr int64_t kWarpsPerMultiprocessor = 32;
constexpr int64_t kPixelsPerWarp = 512;  // at most: what a warp adds in float32
constexpr int64_t kPlaneBlocksPerMultiprocessor = 5;

// Room for the norms that a kernel computes, with its channels in `slices` parts.
struct Norms {
  Norms(const Tensor& inverse_norm, int64_t slices)
      : slices(slices),
        pixels(inverse_norm.numel()),
        values(slices == 1 ? inverse_norm : empty_like_of(inverse_norm, {slices, pixels})) {}
  float* data() const { return pixels == 0 ? nullptr : values.mutable_data_ptr<float>(); }

  int64_t slices, pixels;  // no pixels where nobody asks
  Tensor values;           // the inverse norms where there is one slice, else sums of squares
};

struct Partial {
  Tensor sums;  // float32 [slots, 2, width]
  int64_t parts, width;
  Norms norms;
};

template <class Mu, class Var>
Partial sum_rows(const OnDeviceOf& device, const Tensor& mu, const Tensor& var, const ClassList& list,
                 int64_t classes, const Tensor& inverse_norm) {
  const int64_t dims = mu.size(1), pixels = list.order.numel();
  const int64_t vectors = ceil_div(dims, kVector<Mu>), slices = ceil_div(vectors, 32);
  int lanes = kernels::kMinLanes;
  while (lanes < std::min<int64_t>(vectors, 32)) lanes *= 2;
  const int64_t resident = ceil_div(kWarpsPerMultiprocessor * device.multiprocessors(), slices);
  const int64_t wanted = std::min(std::max(resident, ceil_div(pixels, kPixelsPerWarp)), ceil_div(pixels, 32));
  const int64_t blocks = std::max<int64_t>(1, ceil_div(wanted, kernels::kWarps));
  const int64_t warps = blocks * kernels::kWarps, width = vectors * kVector<Mu>;
  Partial partial{empty_like_of(mu, {warps + classes, 2, width}, ScalarType::Float), warps, width,
                  Norms(inverse_norm, slices)};
  const Mu* const mu_data = mu.const_data_ptr<Mu>();
  const Var* const var_data = var.const_data_ptr<Var>();
  const bool aligned = rows_are_aligned(mu_data, dims) && rows_are_aligned(var_data, dims);
  launch(aligned ? kernels::rows_kernel<Mu, Var, true> : kernels::rows_kernel<Mu, Var, false>,
         dim3(unsigned(blocks), unsigned(slices)), dim3(kernels::kRowThreads), 0, device.stream(), mu_data,
         var_data, list.order.const_data_ptr<int32_t>(), list.start.const_data_ptr<int32_t>(), int(classes),
         dims, width, lanes, partial.sums.mutable_data_ptr<float>(), partial.norms.data(), pixels);
  return partial;
}

template <class Mu, class Var>
Partial sum_planes(const OnDeviceOf& device, const Tensor& mu, const Tensor& var, const Tensor& label,
                   const Tensor& valid, int64_t classes, const Tensor& inverse_norm) {
  const int64_t dims = mu.size(1), plane = mu.size(2) * mu.size(3);
  const int64_t tiles = mu.size(0) * ceil_div(plane, kernels::kTilePixels<Mu>);
  const int64_t channel_groups = ceil_div(dims, kernels::kChannels);
  const int64_t class_groups = ceil_div(classes, kernels::kTableClasses);
  const int64_t resident = kPlaneBlocksPerMultiprocessor * device.multiprocessors();
  const int64_t wanted = std::max<int64_t>(1, resident / (channel_groups * class_groups));
  const int64_t tiles_per_range = std::max<int64_t>(1, ceil_div(tiles, wanted));
  const int64_t ranges = std::max<int64_t>(1, ceil_div(tiles, tiles_per_range));
  Partial partial{empty_like_of(mu, {ranges * classes, 2, dims}, ScalarType::Float), ranges, dims,
                  Norms(inverse_norm, channel_groups)};
  const size_t table = std::min<int64_t>(classes, kernels::kTableClasses) * 2 * kernels::kChannels;
  const Mu* const mu_data = mu.const_data_ptr<Mu>();
  const Var* const var_data = var.const_data_ptr<Var>();
  const bool aligned = rows_are_aligned(mu_data, plane) && rows_are_aligned(var_data, plane);
  launch(aligned ? kernels::planes_kernel<Mu, Var, true> : kernels::planes_kernel<Mu, Var, false>,
         dim3(unsigned(ranges), unsigned(channel_groups), unsigned(class_groups)),
         dim3(kernels::kPlaneThreads), table * sizeof(double), device.stream(), mu_data, var_data,
         labels_of(label), valid.const_data_ptr<bool>(), int(classes), dims, plane, tiles, tiles_per_range,
         dims, partial.sums.mutable_data_ptr<float>(), partial.norms.data(), partial.norms.pixels);
  return partial;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_statistics(Tensor mu, Tensor var, Tensor label,
                                                                Tensor valid, int64_t num_classes,
                                                                bool with_norms, std::optional<Tensor> order,
                                                                std::optional<Tensor> start) {
  const OnDeviceOf device(mu);
  const int64_t dims = mu.size(1);
  const bool rows = mu.stride(1) == 1;
  const ClassList list = order && start ? ClassList{*order, *start}
                                        : class_lists(device, label, valid, valid, num_classes).valid;
  Tensor precision = empty_like_of(mu, {num_classes, dims}, ScalarType::Float);
  Tensor weighted_mean = empty_like_of(mu, {num_classes, dims}, ScalarType::Float);
  Tensor count = empty_like_of(mu, {num_classes}, ScalarType::Long);
  Tensor inverse_norm = with_norms
                            ? empty_like_of(mu, {mu.size(0), mu.size(2), mu.size(3)}, ScalarType::Float)
                            : empty_like_of(mu, {0}, ScalarType::Float);
  if (with_norms) torch::stable::zero_(inverse_norm);
  dispatch_feature_storage(mu, var, [&](auto of_mu, auto of_var) {
    using Mu = decltype(of_mu);
    using Var = decltype(of_var);
    const Partial partial =
        rows ? sum_rows<Mu, Var>(device, mu, var, list, num_classes, inverse_norm)
             : sum_planes<Mu, Var>(device, mu, var, label, valid, num_classes, inverse_norm);
    const dim3 grid(unsigned(ceil_div(dims, kernels::kMergeThreads)), 2, unsigned(num_classes));
    launch(kernels::merge_kernel, grid, dim3(kernels::kMergeThreads, kernels::kMergeThreads), 0,
           device.stream(), partial.sums.const_data_ptr<float>(), rows, partial.parts,
           list.start.const_data_ptr<int32_t>(), int(num_classes), dims, partial.width,
           precision.mutable_data_ptr<float>(), weighted_mean.mutable_data_ptr<float>(),
           count.mutable_data_ptr<int64_t>());
    const Norms& norms = partial.norms;
    if (norms.pixels == 0 || norms.slices == 1) return;
    launch(kernels::norms_kernel, dim3(unsigned(ceil_div(norms.pixels, kernels::kNormThreads))),
           dim3(kernels::kNormThreads), 0, device.stream(), norms.data(), int(norms.slices), norms.pixels,
           list.order.const_data_ptr<int32_t>(), list.start.const_data_ptr<int32_t>() + num_classes,
           inverse_norm.mutable_data_ptr<float>());
  });
  return {precision, weighted_mean, count, inverse_norm};
}

}  // namespace
}  // namespace prcl::cuda

PRCL_CUDA_LIBRARY(m) { m.impl("prototype_statistics", TORCH_BOX(&prcl::cuda::prototype_statistics)); }
