// Mutual likelihood score on CUDA: launches the kernels of mutual_likelihood_score_kernels.cuh. Tensors: mu,
// var [B, rows, D] and scores [B, M, N], float32 or float64.

#include "cuda/launch.h"
#include "cuda/mutual_likelihood_score_kernels.cuh"

#include <algorithm>
#include <tuple>

namespace prcl::cuda {
namespace {

using torch::stable::contiguous;

constexpr int64_t kMaxGridYz = 65535;

void check_grid(int64_t y, int64_t z) {
  STD_TORCH_CHECK(y <= kMaxGridYz && z <= kMaxGridYz,
                  "mutual_likelihood_score: more rows or batches than one launch takes");
}

Tensor mutual_likelihood_score(Tensor mu_a, Tensor var_a, Tensor mu_b, Tensor var_b, bool mean) {
  const OnDeviceOf device(mu_a);
  const int64_t batches = mu_a.size(0), m = mu_a.size(1), n = mu_b.size(1), dims = mu_a.size(2);
  Tensor out = empty_like_of(mu_a, {batches, m, n});
  if (out.numel() == 0) return out;
  const Tensor ma = contiguous(mu_a), va = contiguous(var_a), mb = contiguous(mu_b), vb = contiguous(var_b);
  check_grid(ceil_div(m, mls::kTile), batches);
  const dim3 grid(ceil_div(n, mls::kTile), ceil_div(m, mls::kTile), batches);
  const dim3 block(mls::kThreadsPerSide, mls::kThreadsPerSide);
  dispatch_float_or_double(mu_a, [&](auto zero) {
    using T = decltype(zero);
    launch(mls::forward_kernel<T>, grid, block, 0, device.stream(), ma.const_data_ptr<T>(),
           va.const_data_ptr<T>(), mb.const_data_ptr<T>(), vb.const_data_ptr<T>(), out.mutable_data_ptr<T>(),
           m, n, dims, mls::Affine<T>(dims, mean));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mutual_likelihood_score_backward(Tensor grad, Tensor mu_a,
                                                                            Tensor var_a, Tensor mu_b,
                                                                            Tensor var_b, bool mean,
                                                                            bool need_a, bool need_b) {
  const OnDeviceOf device(mu_a);
  const int64_t batches = mu_a.size(0), m = mu_a.size(1), n = mu_b.size(1), dims = mu_a.size(2);
  const auto result = [&](bool need, int64_t rows) {
    return need ? empty_like_of(mu_a, {batches, rows, dims}) : empty_like_of(mu_a, {0});
  };
  Tensor grad_mu_a = result(need_a, m), grad_var_a = result(need_a, m);
  Tensor grad_mu_b = result(need_b, n), grad_var_b = result(need_b, n);
  const Tensor g = contiguous(grad), ma = contiguous(mu_a), va = contiguous(var_a), mb = contiguous(mu_b),
               vb = contiguous(var_b);
  const auto one_side = [&](const Tensor& mu_x, const Tensor& var_x, const Tensor& mu_y, const Tensor& var_y,
                            int64_t rows, int64_t others, int64_t stride_x, int64_t stride_y, Tensor& to_mu,
                            Tensor& to_var) {
    if (to_mu.numel() == 0) return;
    const int64_t threads = std::min<int64_t>(mls::kMaxThreads, ceil_div(dims, 32) * 32);
    check_grid(ceil_div(dims, threads), batches);
    const dim3 grid(ceil_div(rows, mls::kRows), ceil_div(dims, threads), batches);
    dispatch_float_or_double(mu_x, [&](auto zero) {
      using T = decltype(zero);
      launch(mls::backward_kernel<T>, grid, dim3(threads), 0, device.stream(), g.const_data_ptr<T>(),
             mu_x.const_data_ptr<T>(), var_x.const_data_ptr<T>(), mu_y.const_data_ptr<T>(),
             var_y.const_data_ptr<T>(), to_mu.mutable_data_ptr<T>(), to_var.mutable_data_ptr<T>(), rows,
             others, dims, stride_x, stride_y, T(prcl::mls::gradient_scale(dims, mean)));
    });
  };
  if (need_a) one_side(ma, va, mb, vb, m, n, n, 1, grad_mu_a, grad_var_a);
  if (need_b) one_side(mb, vb, ma, va, n, m, 1, n, grad_mu_b, grad_var_b);
  return {grad_mu_a, grad_var_a, grad_mu_b, grad_var_b};
}

}  // namespace
}  // namespace prcl::cuda

PRCL_CUDA_LIBRARY(m) {
  m.impl("mutual_likelihood_score", TORCH_BOX(&prcl::cuda::mutual_likelihood_score));
  m.impl("mutual_likelihood_score_backward", TORCH_BOX(&prcl::cuda::mutual_likelihood_score_backward));
}
