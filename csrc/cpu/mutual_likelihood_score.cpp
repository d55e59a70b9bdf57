// Mutual likelihood score on the CPU: packs the operands, then shares rows among threads. The arithmetic is
// in mutual_likelihood_score_kernels.h. Tensors: mu, var [B, rows, D] and scores [B, M, N], float32 or
// float64.

#include "cpu/buffer.h"
#include "cpu/mutual_likelihood_score_kernels.h"
#include "shared/tensor.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

namespace prcl::cpu {
namespace {

using torch::stable::contiguous;
using torch::stable::parallel_for;

constexpr int64_t kRowsPerTask = 32;      // 64 KB of rows a at D = 256: they stay in L2 while b passes
constexpr int64_t kSerialWork = 1 << 16;  // pairs times dimensions below which a second thread does not pay

// Calls f(batch, row_begin, row_end) for all rows of all batch entries, in parallel.
template <class F>
void for_rows(int64_t batches, int64_t rows, int64_t work_per_row, const F& f) {
  const int64_t tasks = ceil_div(rows, kRowsPerTask);
  const int64_t grain = std::max<int64_t>(1, kSerialWork / std::max<int64_t>(1, work_per_row * kRowsPerTask));
  parallel_for(0, batches * tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % tasks * kRowsPerTask;
      f(task / tasks, first, std::min(first + kRowsPerTask, rows));
    }
  });
}

template <class T>
T cut(T variance) {
  return variance > T(kMaxVariance) ? T(kMaxVariance) : variance;
}

template <class T>
std::vector<uint8_t> rows_with_infinity(const T* var, int64_t rows, int64_t dims) {
  std::vector<uint8_t> found(rows);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t l = 0; l < dims; ++l) found[i] |= var[i * dims + l] > std::numeric_limits<T>::max();
  }
  return found;
}

// [B, rows, D] -> [B, ceil(rows / lanes), D, lanes]; missing rows are zero with variance one.
template <class T>
void pack_rows(const T* mu, const T* var, int64_t batches, int64_t rows, int64_t dims, int64_t lanes,
               T* to_mu, T* to_var) {
  const int64_t tiles = ceil_div(rows, lanes);
  const int64_t grain = std::max<int64_t>(1, kSerialWork / (dims * lanes));
  parallel_for(0, batches * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile % tiles * lanes, batch = tile / tiles;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const bool real = first + lane < rows;
        const int64_t from = (batch * rows + first + lane) * dims;
        for (int64_t l = 0; l < dims; ++l) {
          to_mu[(tile * dims + l) * lanes + lane] = real ? mu[from + l] : T(0);
          to_var[(tile * dims + l) * lanes + lane] = real ? cut(var[from + l]) : T(1);
        }
      }
    }
  });
}

// [B, rows, D] -> [B, ceil(D / lanes), rows, lanes]; missing dimensions are zero with variance one.
template <class T>
void pack_dims(const T* mu, const T* var, int64_t batches, int64_t rows, int64_t dims, int64_t lanes,
               T* to_mu, T* to_var) {
  const int64_t tiles = ceil_div(dims, lanes);
  const int64_t grain = std::max<int64_t>(1, kSerialWork / dims);
  parallel_for(0, batches * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t batch = row / rows;
      for (int64_t l = 0; l < tiles * lanes; ++l) {
        const int64_t to = ((batch * tiles + l / lanes) * rows + row % rows) * lanes + l % lanes;
        to_mu[to] = l < dims ? mu[row * dims + l] : T(0);
        to_var[to] = l < dims ? cut(var[row * dims + l]) : T(1);
      }
    }
  });
}

Tensor mutual_likelihood_score(Tensor mu_a, Tensor var_a, Tensor mu_b, Tensor var_b, bool mean) {
  const int64_t batches = mu_a.size(0), m = mu_a.size(1), n = mu_b.size(1), dims = mu_a.size(2);
  Tensor out = empty_like_of(mu_a, {batches, m, n});
  if (out.numel() == 0) return out;
  const Tensor ma = contiguous(mu_a), va = contiguous(var_a), mb = contiguous(mu_b), vb = contiguous(var_b);
  dispatch_float_or_double(mu_a, [&](auto zero) {
    using T = decltype(zero);
    const int64_t lanes = vector_bytes() / int64_t(sizeof(T)), tiles = ceil_div(n, lanes);
    const int64_t packed = tiles * dims * lanes;
    const T* var_rows = va.const_data_ptr<T>();
    const Buffer<T> var_cut(batches * m * dims), mu_packed(batches * packed), var_packed(batches * packed);
    std::transform(var_rows, var_rows + batches * m * dims, var_cut.data(), cut<T>);
    pack_rows(mb.const_data_ptr<T>(), vb.const_data_ptr<T>(), batches, n, dims, lanes, mu_packed.data(),
              var_packed.data());
    const std::vector<uint8_t> infinite_a = rows_with_infinity(var_rows, batches * m, dims);
    const std::vector<uint8_t> infinite_b = rows_with_infinity(vb.const_data_ptr<T>(), batches * n, dims);
    for_rows(batches, m, n * dims, [&](int64_t batch, int64_t begin, int64_t end) {
      dispatch<mls::Forward<T>>(mls::ForwardArgs<T>{
          ma.const_data_ptr<T>() + batch * m * dims, var_cut.data() + batch * m * dims,
          mu_packed.data() + batch * packed, var_packed.data() + batch * packed,
          infinite_a.data() + batch * m, infinite_b.data() + batch * n,
          out.mutable_data_ptr<T>() + batch * m * n, begin, end, n, dims, mls::Affine<T>(dims, mean)});
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mutual_likelihood_score_backward(Tensor grad, Tensor mu_a,
                                                                            Tensor var_a, Tensor mu_b,
                                                                            Tensor var_b, bool mean,
                                                                            bool need_a, bool need_b) {
  const int64_t batches = mu_a.size(0), m = mu_a.size(1), n = mu_b.size(1), dims = mu_a.size(2);
  const auto result = [&](bool need, int64_t rows) {
    return need ? empty_like_of(mu_a, {batches, rows, dims}) : empty_like_of(mu_a, {0});
  };
  Tensor grad_mu_a = result(need_a, m), grad_var_a = result(need_a, m);
  Tensor grad_mu_b = result(need_b, n), grad_var_b = result(need_b, n);
  const Tensor g = contiguous(grad), ma = contiguous(mu_a), va = contiguous(var_a), mb = contiguous(mu_b),
               vb = contiguous(var_b);
  dispatch_float_or_double(mu_a, [&](auto zero) {
    using T = decltype(zero);
    const int64_t lanes = vector_bytes() / int64_t(sizeof(T)), width = ceil_div(dims, lanes) * lanes;
    const Buffer<T> mu_a_packed(batches * m * width), var_a_packed(batches * m * width);
    const Buffer<T> mu_b_packed(batches * n * width), var_b_packed(batches * n * width);
    pack_dims(ma.const_data_ptr<T>(), va.const_data_ptr<T>(), batches, m, dims, lanes, mu_a_packed.data(),
              var_a_packed.data());
    pack_dims(mb.const_data_ptr<T>(), vb.const_data_ptr<T>(), batches, n, dims, lanes, mu_b_packed.data(),
              var_b_packed.data());
    const T scale = T(prcl::mls::gradient_scale(dims, mean));
    const auto one_side = [&](const Buffer<T>& mu_x, const Buffer<T>& var_x, const Buffer<T>& mu_y,
                              const Buffer<T>& var_y, int64_t rows, int64_t others, int64_t stride_x,
                              int64_t stride_y, Tensor& to_mu, Tensor& to_var) {
      for_rows(batches, rows, others * dims, [&](int64_t batch, int64_t begin, int64_t end) {
        const int64_t x = batch * rows * width, y = batch * others * width, to = batch * rows * dims;
        dispatch<mls::BackwardOneSide<T>>(mls::BackwardArgs<T>{
            mu_x.data() + x, var_x.data() + x, mu_y.data() + y, var_y.data() + y,
            g.const_data_ptr<T>() + batch * m * n, to_mu.mutable_data_ptr<T>() + to,
            to_var.mutable_data_ptr<T>() + to, begin, end, rows, others, dims, stride_x, stride_y, scale});
      });
    };
    if (need_a)
      one_side(mu_a_packed, var_a_packed, mu_b_packed, var_b_packed, m, n, n, 1, grad_mu_a, grad_var_a);
    if (need_b)
      one_side(mu_b_packed, var_b_packed, mu_a_packed, var_a_packed, n, m, 1, n, grad_mu_b, grad_var_b);
  });
  return {grad_mu_a, grad_var_a, grad_mu_b, grad_var_b};
}

}  // namespace
}  // namespace prcl::cpu

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CPU, m) {
  m.impl("mutual_likelihood_score", TORCH_BOX(&prcl::cpu::mutual_likelihood_score));
  m.impl("mutual_likelihood_score_backward", TORCH_BOX(&prcl::cpu::mutual_likelihood_score_backward));
}
