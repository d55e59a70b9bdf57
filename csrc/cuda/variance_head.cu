// The probability head's tail on CUDA: launches the kernels of variance_head_kernels.cuh. x, grad, sigma^2
// and grad_x are rows [P, D], float32, bfloat16 or float16; what belongs to a channel is float32 [D].

#include "cuda/launch.h"
#include "cuda/storage.h"
#include "cuda/variance_head_kernels.cuh"

#include <algorithm>
#include <optional>
#include <tuple>

namespace prcl::cuda {
namespace {

namespace kernels = head;
using kernels::Parameters;
using kernels::Shape;

// For a kernel that has `blocks` on a multiprocessor: they own all rows between them.
template <class S>
Shape shape_of(const OnDeviceOf& device, const Tensor& x, int blocks) {
  Shape shape = {};
  shape.rows = x.size(0);
  shape.dims = x.size(1);
  const int64_t vectors = ceil_div(shape.dims, kVector<S>);
  shape.lanes = 1;
  while (shape.lanes < std::min<int64_t>(vectors, 32)) shape.lanes *= 2;
  const int64_t slices = ceil_div(vectors, shape.lanes), step = kernels::kThreads / shape.lanes;
  const int64_t resident = ceil_div(int64_t(blocks) * device.multiprocessors(), slices);
  // Whole steps of rows, so that no thread of a block but the last one's has fewer than another.
  shape.rows_a_part = ceil_div(ceil_div(shape.rows, resident), step) * step;
  shape.parts = ceil_div(shape.rows, shape.rows_a_part);
  shape.width = slices * shape.lanes * kVector<S>;
  return shape;
}

template <class S>
dim3 grid_of(const Shape& shape) {
  return dim3(unsigned(shape.parts), unsigned(shape.width / (shape.lanes * kVector<S>)));
}

Parameters parameters_of(const Tensor& mean, const Tensor& var, const Tensor& gamma, const Tensor& beta,
                         const Tensor* means, double eps) {
  return {mean.const_data_ptr<float>(),
          var.const_data_ptr<float>(),
          gamma.const_data_ptr<float>(),
          beta.const_data_ptr<float>(),
          means == nullptr ? nullptr : means->const_data_ptr<float>(),
          float(eps)};
}

// Calls f(S{}, O{}) with the types of x and of sigma^2.
template <class F>
void dispatch_types(const Tensor& x, ScalarType other, const F& f) {
  dispatch_floating_with(x, other, [&](auto zero, auto other_zero) {
    if constexpr (std::is_same_v<decltype(zero), double>) {
      STD_TORCH_CHECK(false, "the CUDA kernels take float32, bfloat16 or float16");
    } else {
      f(zero, other_zero);
    }
  });
}

std::tuple<Tensor, Tensor> variance_head_moments(Tensor x) {
  const OnDeviceOf device(x);
  Tensor mean = empty_like_of(x, {x.size(1)}, ScalarType::Float);
  Tensor var = empty_like_of(x, {x.size(1)}, ScalarType::Float);
  dispatch_storage(x.scalar_type(), [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    const Shape shape = shape_of<S>(device, x, kernels::kMomentsBlocks);
    Tensor partial = empty_like_of(x, {shape.parts, 2, shape.width}, ScalarType::Float);
    const S* const from = x.const_data_ptr<S>();
    launch(rows_are_aligned(from, shape.dims) ? kernels::moments_kernel<S, true>
                                              : kernels::moments_kernel<S, false>,
           grid_of<S>(shape), dim3(kernels::kThreads), 0, device.stream(), from, shape,
           partial.mutable_data_ptr<float>());
    launch(kernels::merge_moments_kernel<S>, dim3(unsigned(ceil_div(shape.dims, kernels::kMergeThreads))),
           dim3(kernels::kMergeThreads, kernels::kMergeThreads), 0, device.stream(), from,
           partial.const_data_ptr<float>(), shape, mean.mutable_data_ptr<float>(),
           var.mutable_data_ptr<float>());
  });
  return {mean, var};
}

Tensor variance_head(Tensor x, Tensor mean, Tensor var, Tensor gamma, Tensor beta, double eps,
                     ScalarType dtype) {
  const OnDeviceOf device(x);
  Tensor y = empty_like_of(x, {x.size(0), x.size(1)}, dtype);
  dispatch_types(x, dtype, [&](auto zero, auto other) {
    using S = decltype(zero);
    using O = decltype(other);
    const Shape shape = shape_of<S>(device, x, kernels::kForwardBlocks);
    const S* const from = x.const_data_ptr<S>();
    O* const to = y.mutable_data_ptr<O>();
    const bool aligned = rows_are_aligned(from, shape.dims) && rows_are_aligned(to, shape.dims);
    launch(aligned ? kernels::forward_kernel<S, O, true> : kernels::forward_kernel<S, O, false>,
           grid_of<S>(shape), dim3(kernels::kThreads), 0, device.stream(), from, shape,
           parameters_of(mean, var, gamma, beta, nullptr, eps), to);
  });
  return y;
}

Tensor variance_head_backward_sums(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor gamma, Tensor beta,
                                   double eps) {
  const OnDeviceOf device(x);
  Tensor sums = empty_like_of(x, {2, x.size(1)}, ScalarType::Float);
  dispatch_types(x, grad.scalar_type(), [&](auto zero, auto other) {
    using S = decltype(zero);
    using O = decltype(other);
    const Shape shape = shape_of<S>(device, x, kernels::kBackwardBlocks);
    Tensor partial = empty_like_of(x, {shape.parts, 2, shape.width}, ScalarType::Float);
    const Parameters parameters = parameters_of(mean, var, gamma, beta, nullptr, eps);
    const S* const from = x.const_data_ptr<S>();
    const O* const from_grad = grad.const_data_ptr<O>();
    const bool aligned = rows_are_aligned(from, shape.dims) && rows_are_aligned(from_grad, shape.dims);
    launch(aligned ? kernels::backward_sums_kernel<S, O, true> : kernels::backward_sums_kernel<S, O, false>,
           grid_of<S>(shape), dim3(kernels::kThreads), 0, device.stream(), from_grad, from, shape, parameters,
           partial.mutable_data_ptr<float>());
    launch(kernels::merge_sums_kernel, dim3(unsigned(ceil_div(shape.dims, kernels::kMergeThreads)), 2),
           dim3(kernels::kMergeThreads, kernels::kMergeThreads), 0, device.stream(),
           partial.const_data_ptr<float>(), shape, parameters, sums.mutable_data_ptr<float>());
  });
  return sums;
}

Tensor variance_head_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor gamma, Tensor beta,
                              std::optional<Tensor> means, double eps) {
  const OnDeviceOf device(x);
  Tensor grad_x = empty_like_of(x, {x.size(0), x.size(1)});
  dispatch_types(x, grad.scalar_type(), [&](auto zero, auto other) {
    using S = decltype(zero);
    using O = decltype(other);
    const Shape shape = shape_of<S>(device, x, kernels::kBackwardBlocks);
    const S* const from = x.const_data_ptr<S>();
    const O* const from_grad = grad.const_data_ptr<O>();
    S* const to = grad_x.mutable_data_ptr<S>();
    const bool aligned = rows_are_aligned(from, shape.dims) && rows_are_aligned(from_grad, shape.dims) &&
                         rows_are_aligned(to, shape.dims);
    launch(aligned ? kernels::backward_kernel<S, O, true> : kernels::backward_kernel<S, O, false>,
           grid_of<S>(shape), dim3(kernels::kThreads), 0, device.stream(), from_grad, from, shape,
           parameters_of(mean, var, gamma, beta, means ? &*means : nullptr, eps), to);
  });
  return grad_x;
}

}  // namespace
}  // namespace prcl::cuda

PRCL_CUDA_LIBRARY(m) {
  m.impl("variance_head_moments", TORCH_BOX(&prcl::cuda::variance_head_moments));
  m.impl("variance_head", TORCH_BOX(&prcl::cuda::variance_head));
  m.impl("variance_head_backward_sums", TORCH_BOX(&prcl::cuda::variance_head_backward_sums));
  m.impl("variance_head_backward", TORCH_BOX(&prcl::cuda::variance_head_backward));
}
