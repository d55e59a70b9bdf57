// Probabilistic InfoNCE on CUDA: weights of the classes, inverse norms, the kernel of
// probabilistic_info_nce_kernels.cuh, the sum of the anchors' losses; and the backward pass, which writes the
// anchors' gradient rows into zeros.

#include "cuda/launch.h"
#include "cuda/probabilistic_info_nce_kernels.cuh"
#include "cuda/storage.h"

#include <optional>
#include <tuple>

namespace prcl::cuda {
namespace {

using info_nce::Problem;

constexpr int kThreads = 256, kWarpsPerBlock = kThreads / 32;

// Block c: what turns the losses of class c's anchors into the loss, times the class's factor where there is
// one.
__global__ void __launch_bounds__(kThreads)
    class_weight_kernel(const int64_t* anchor_index, const int64_t* positive_count, const float* factor,
                        int classes, int anchors, float* weight) {
  const int c = blockIdx.x;
  int64_t present = 0, drawn = 0;
  for (int i = threadIdx.x; i < classes; i += kThreads) present += positive_count[i] > 0;
  for (int i = threadIdx.x; i < anchors; i += kThreads) drawn += anchor_index[int64_t(c) * anchors + i] >= 0;
  present = block_sum(present);
  drawn = block_sum(drawn);
  if (threadIdx.x != 0) return;
  const bool counts = positive_count[c] > 0 && drawn > 0;
  weight[c] = counts ? (factor ? factor[c] : 1.0f) / float(drawn * present) : 0.0f;
}

// One warp a row: 1 / |row|, the norm clamped from below.
template <class S>
__global__ void __launch_bounds__(kThreads)
    inverse_norm_kernel(const S* rows, int64_t count, int dims, bool aligned, float* inverse_norm) {
  const int64_t row = int64_t(blockIdx.x) * kWarpsPerBlock + int(threadIdx.x) / 32;
  if (row >= count) return;
  const int lane = int(threadIdx.x) % 32;
  float sum = 0.0f;
  for (int channel = lane * kVector<S>; channel < dims; channel += 32 * kVector<S>) {
    float values[kVector<S>];
    unpack(load(rows + row * dims + channel, dims - channel, 0.0f, aligned), values);
#pragma unroll
    for (int i = 0; i < kVector<S>; ++i) sum = fmaf(values[i], values[i], sum);
  }
  sum = warp_sum(sum);
  if (lane == 0) inverse_norm[row] = prcl::inverse_norm(sum);
}

template <class S>
Tensor inverse_norms(const OnDeviceOf& device, const Tensor& like, const S* rows, int64_t count, int dims) {
  Tensor result = empty_like_of(like, {count});
  if (count == 0) return result;
  launch(inverse_norm_kernel<S>, dim3(ceil_div(count, kWarpsPerBlock)), dim3(kThreads), 0, device.stream(),
         rows, count, dims, rows_are_aligned(rows, dims), result.mutable_data_ptr<float>());
  return result;
}

template <class Mu, class Var>
void launch_info_nce(const OnDeviceOf& device, const Problem<Mu, Var>& problem) {
  const auto run = [&](auto kernel) {
    const int64_t anchors = int64_t(problem.classes) * problem.anchors;
    launch(kernel, dim3(ceil_div(anchors, info_nce::kWarps)), dim3(info_nce::kWarps * 32), 0, device.stream(),
           problem);
  };
  if (problem.dims == 256 && problem.aligned) return run(info_nce::info_nce_kernel<Mu, Var, 8, true>);
  if (problem.dims <= 256) return run(info_nce::info_nce_kernel<Mu, Var, 8, false>);
  if (problem.dims <= 512) return run(info_nce::info_nce_kernel<Mu, Var, 16, false>);
  run(info_nce::info_nce_kernel<Mu, Var, 32, false>);
}

std::tuple<Tensor, Tensor, Tensor> probabilistic_info_nce(
    Tensor mu, Tensor var, Tensor anchor_index, Tensor negative_index, Tensor positive_mean,
    Tensor positive_variance, Tensor positive_count, std::optional<Tensor> virtual_mu,
    std::optional<Tensor> virtual_var, std::optional<Tensor> virtual_known,
    std::optional<Tensor> class_factor, std::optional<Tensor> inverse_norm, double tau, bool mean,
    bool normalize, bool needs_grad) {
  const OnDeviceOf device(mu);
  const int64_t classes = anchor_index.size(0), anchors = anchor_index.size(1), dims = mu.size(1);
  const int64_t groups = negative_index.size(1), negatives = negative_index.size(2);
  STD_TORCH_CHECK(dims <= 1024, "probabilistic_info_nce: the CUDA kernels take at most 1024 dimensions, got ",
                  dims);
  const int64_t virtuals = virtual_mu ? virtual_mu->size(1) : 0;
  const Tensor& like = positive_mean;  // float32
  Tensor loss = empty_like_of(like, {}), anchor_loss = empty_like_of(like, {classes * anchors}),
         class_weight = empty_like_of(like, {classes});
  const auto rows = [&] {
    return needs_grad ? empty_like_of(like, {classes, anchors, dims}) : empty_like_of(like, {0});
  };
  Tensor grad_mu = rows(), grad_var = rows();
  if (classes > 0) {
    launch(class_weight_kernel, dim3(classes), dim3(kThreads), 0, device.stream(),
           anchor_index.const_data_ptr<int64_t>(), positive_count.const_data_ptr<int64_t>(),
           class_factor ? class_factor->const_data_ptr<float>() : nullptr, int(classes), int(anchors),
           class_weight.mutable_data_ptr<float>());
    dispatch_feature_storage(mu, var, [&](auto of_mu, auto of_var) {
      using Mu = decltype(of_mu);
      using Var = decltype(of_var);
      Problem<Mu, Var> p = {};
      p.mu = static_cast<const Mu*>(mu.const_data_ptr());
      p.var = static_cast<const Var*>(var.const_data_ptr());
      p.anchor_index = anchor_index.const_data_ptr<int64_t>();
      p.negative_index = negative_index.const_data_ptr<int64_t>();
      p.positive_mean = positive_mean.const_data_ptr<float>();
      p.positive_variance = positive_variance.const_data_ptr<float>();
      p.virtual_mu = virtual_mu ? virtual_mu->const_data_ptr<float>() : nullptr;
      p.virtual_var = virtual_var ? virtual_var->const_data_ptr<float>() : nullptr;
      p.virtual_known = virtual_known ? virtual_known->const_data_ptr<bool>() : nullptr;
      p.class_weight = class_weight.const_data_ptr<float>();
      p.classes = int(classes);
      p.anchors = int(anchors);
      p.groups = int(groups);
      p.negatives = int(negatives);
      p.virtuals = int(virtuals);
      p.dims = int(dims);
      p.aligned = rows_are_aligned(p.mu, dims) && rows_are_aligned(p.var, dims) &&
                  rows_are_aligned(p.positive_mean, dims) && rows_are_aligned(p.positive_variance, dims) &&
                  rows_are_aligned(p.virtual_mu, dims) && rows_are_aligned(p.virtual_var, dims);
      p.scale = float(1.0 / (mean ? tau * double(dims) : tau));
      p.logit_scale = float(-0.5 / kLn2 / (mean ? tau * double(dims) : tau));
      p.anchor_loss = anchor_loss.mutable_data_ptr<float>();
      p.grad_mu = needs_grad ? grad_mu.mutable_data_ptr<float>() : nullptr;
      p.grad_var = needs_grad ? grad_var.mutable_data_ptr<float>() : nullptr;
      if (!normalize) return launch_info_nce(device, p);
      const Tensor of_pixels =
          inverse_norm ? *inverse_norm : inverse_norms(device, like, p.mu, mu.size(0), p.dims);
      const Tensor of_positives = inverse_norms(device, like, p.positive_mean, classes, p.dims);
      const Tensor of_virtuals = inverse_norms(device, like, p.virtual_mu, classes * virtuals, p.dims);
      p.inverse_norm = of_pixels.const_data_ptr<float>();
      p.positive_inverse_norm = of_positives.const_data_ptr<float>();
      p.virtual_inverse_norm = of_virtuals.const_data_ptr<float>();
      launch_info_nce(device, p);
    });
  }
  launch(sum_kernel<float>, dim3(1), dim3(kSumThreads), 0, device.stream(),
         anchor_loss.const_data_ptr<float>(), classes * anchors, loss.mutable_data_ptr<float>());
  return {loss, grad_mu, grad_var};
}

// The warp of anchor a adds the rows of all anchors of its pixel, ascending, unless one before a has it.
template <class S>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const int64_t* anchor_index, int64_t anchors, int dims, const float* grad_loss,
                   const float* rows, int64_t pixels_per_image, bool channels_last, S* grad) {
  constexpr int kPerLane = 8;  // channels at a time
  const int64_t a = int64_t(blockIdx.x) * kWarpsPerBlock + int(threadIdx.x) / 32;
  if (a >= anchors) return;
  const int64_t pixel = anchor_index[a];
  if (pixel < 0) return;
  const int lane = int(threadIdx.x) % 32;
  const float factor = *grad_loss;
  const int64_t image = pixel / pixels_per_image,
                first =
                    channels_last ? pixel * dims : image * dims * pixels_per_image + pixel % pixels_per_image;
  const int64_t stride = channels_last ? 1 : pixels_per_image;
  for (int slice = 0; slice < dims; slice += 32 * kPerLane) {
    float sum[kPerLane] = {};
    for (int64_t base = 0; base < anchors; base += 32) {
      const bool same = base + lane < anchors && anchor_index[base + lane] == pixel;
      for (unsigned found = __ballot_sync(kAllLanes, same); found != 0; found &= found - 1) {
        const int64_t other = base + __ffs(int(found)) - 1;
        if (other < a) return;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          const int channel = slice + i * 32 + lane;
          if (channel < dims) sum[i] += rows[other * dims + channel];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int channel = slice + i * 32 + lane;
      if (channel < dims) grad[first + channel * stride] = S(sum[i] * factor);
    }
  }
}

std::tuple<Tensor, Tensor> probabilistic_info_nce_backward(Tensor grad_loss, Tensor grad_mu_rows,
                                                           Tensor grad_var_rows, Tensor anchor_index,
                                                           int64_t batch, int64_t height, int64_t width,
                                                           ScalarType mu_dtype, ScalarType var_dtype,
                                                           bool mu_channels_last, bool var_channels_last) {
  const OnDeviceOf device(grad_mu_rows);
  const int64_t anchors = anchor_index.numel(), dims = grad_mu_rows.size(2);
  const auto gradient = [&](const Tensor& rows, ScalarType dtype, bool channels_last) {
    const int64_t size[] = {batch, dims, height, width};
    Tensor grad = torch::stable::empty({size, 4}, dtype, std::nullopt, rows.device(), std::nullopt,
                                       channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                     : torch::headeronly::MemoryFormat::Contiguous);
    torch::stable::zero_(grad);
    if (anchors == 0) return grad;
    dispatch_storage(dtype, [&](auto* storage) {
      using S = std::remove_pointer_t<decltype(storage)>;
      launch(scatter_kernel<S>, dim3(ceil_div(anchors, kWarpsPerBlock)), dim3(kThreads), 0, device.stream(),
             anchor_index.const_data_ptr<int64_t>(), anchors, int(dims), grad_loss.const_data_ptr<float>(),
             rows.const_data_ptr<float>(), height * width, channels_last,
             static_cast<S*>(grad.mutable_data_ptr()));
    });
    return grad;
  };
  Tensor grad_mu = gradient(grad_mu_rows, mu_dtype, mu_channels_last);
  Tensor grad_var = gradient(grad_var_rows, var_dtype, var_channels_last);
  return {grad_mu, grad_var};
}

}  // namespace
}  // namespace prcl::cuda

PRCL_CUDA_LIBRARY(m) {
  m.impl("probabilistic_info_nce", TORCH_BOX(&prcl::cuda::probabilistic_info_nce));
  m.impl("probabilistic_info_nce_backward", TORCH_BOX(&prcl::cuda::probabilistic_info_nce_backward));
}
