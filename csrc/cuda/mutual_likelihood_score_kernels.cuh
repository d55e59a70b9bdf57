// The CUDA kernels of the mutual likelihood score.
//
// Forward: one block of 16 x 16 threads owns 64 x 64 scores, a thread 4 x 4 of them, in registers. The block
// walks over D in steps of 16 dimensions, whose rows are read once, coalesced, and kept in shared memory as
// [dimension, row]. Two dimensions share a reciprocal and a logarithm. Sums run over D in ascending order.
//
// Backward, one side: gradients of rows x from all rows y. A block owns 16 rows and one dimension per thread,
// with the rows' values and sums in registers; it reads row y once per dimension, and the 16 gradients of
// each y from shared memory. Sums run over y in ascending order, without atomics: deterministic. The other
// side is a second launch with the roles exchanged, which recomputes the reciprocals.
//
// Where one side's variances show that no sum can lie below the smallest one, the clamp is left out.
//
// float32 uses the approximate functions of approximate.cuh: over D terms the score's error stays near 1e-6
// of the sum of their magnitudes.
#pragma once

#include "cuda/approximate.cuh"
#include "shared/mls.h"

namespace prcl::cuda::mls {

using prcl::mls::Affine;

constexpr int kTile = 64;
constexpr int kPerThread = 4;
constexpr int kThreadsPerSide = kTile / kPerThread;
constexpr int kDims = 16;           // dimensions per step of the forward kernel
constexpr int kStride = kTile + 4;  // keeps 16-byte alignment and spreads the stores over the banks
constexpr int kRows = 16;           // rows per block of the backward kernel
constexpr int kGrads = 32;          // rows y between two loads of their gradients
constexpr int kMaxThreads = 128;

__device__ __forceinline__ float reciprocal(float x) { return approximate_reciprocal(x); }
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }
__device__ __forceinline__ float log_base_2(float x) { return approximate_log2(x); }
__device__ __forceinline__ double log_base_2(double x) { return log2(x); }

template <class T>
__device__ __forceinline__ T cut(T variance) {
  return variance > T(kMaxVariance) ? T(kMaxVariance) : variance;
}

template <class T>
__device__ __forceinline__ T clamped(T sum) {
  return sum < T(kMinVariance) ? T(kMinVariance) : sum;
}

template <class T>
struct Operand {
  T mu[kDims][kStride];
  T var[kDims][kStride];
  int infinite[kTile];
};

// Reads dimensions first_dim.. of rows first_row.. ; what lies outside is zero with variance one half, so
// that two such variances sum to one and add nothing to the score. Returns whether this thread has read a
// variance below kMinVariance.
template <class T>
__device__ __forceinline__ bool load_operand(Operand<T>& to, const T* mu, const T* var, int64_t first_row,
                                             int64_t rows, int64_t first_dim, int64_t dims) {
  constexpr int kRowStep = kThreadsPerSide * kThreadsPerSide / kDims;
  const int thread = threadIdx.y * kThreadsPerSide + threadIdx.x;
  const int l = thread % kDims, first = thread / kDims;
  const bool real_dim = first_dim + l < dims;
  int64_t from = (first_row + first) * dims + first_dim + l;
  bool tiny = false;
#pragma unroll
  for (int row = first; row < first + kTile; row += kRowStep) {
    const bool real = real_dim && first_row + row < rows;
    const T variance = real ? var[from] : T(0.5);
    to.mu[l][row] = real ? mu[from] : T(0);
    to.var[l][row] = cut(variance);
    if (isinf(variance)) to.infinite[row] = 1;
    tiny |= variance < T(kMinVariance);
    from += kRowStep * dims;
  }
  return tiny;
}

// Adds the kDims dimensions in shared memory to a thread's scores.
template <bool kMayClamp, class T>
__device__ __forceinline__ void add_dimensions(const Operand<T>& a, const Operand<T>& b, int row, int column,
                                               T (&quadratic)[kPerThread][kPerThread],
                                               T (&log2_product)[kPerThread][kPerThread]) {
#pragma unroll 2
  for (int l = 0; l < kDims; l += 2) {
    T mu[2][kPerThread], var[2][kPerThread];
#pragma unroll
    for (int c = 0; c < kPerThread; ++c) {
      mu[0][c] = b.mu[l][column + c];
      mu[1][c] = b.mu[l + 1][column + c];
      var[0][c] = b.var[l][column + c];
      var[1][c] = b.var[l + 1][column + c];
    }
#pragma unroll
    for (int r = 0; r < kPerThread; ++r) {
      const T mu0 = a.mu[l][row + r], mu1 = a.mu[l + 1][row + r];
      const T var0 = a.var[l][row + r], var1 = a.var[l + 1][row + r];
#pragma unroll
      for (int c = 0; c < kPerThread; ++c) {
        T s0 = var0 + var[0][c], s1 = var1 + var[1][c];
        if (kMayClamp) {
          s0 = clamped(s0);
          s1 = clamped(s1);
        }
        const T d0 = mu0 - mu[0][c], d1 = mu1 - mu[1][c];
        const T p = s0 * s1;
        quadratic[r][c] += (d0 * d0 * s1 + d1 * d1 * s0) * reciprocal(p);
        log2_product[r][c] += log_base_2(p);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreadsPerSide* kThreadsPerSide)
    forward_kernel(const T* mu_a, const T* var_a, const T* mu_b, const T* var_b, T* out, int64_t m, int64_t n,
                   int64_t dims, Affine<T> affine) {
  __shared__ Operand<T> a, b;
  const int64_t batch = blockIdx.z, first_a = int64_t(blockIdx.y) * kTile,
                first_b = int64_t(blockIdx.x) * kTile;
  mu_a += batch * m * dims;
  var_a += batch * m * dims;
  mu_b += batch * n * dims;
  var_b += batch * n * dims;
  out += batch * m * n;
  const int thread = threadIdx.y * kThreadsPerSide + threadIdx.x;
  if (thread < kTile) a.infinite[thread] = b.infinite[thread] = 0;

  T quadratic[kPerThread][kPerThread] = {}, log2_product[kPerThread][kPerThread] = {};
  const int row = threadIdx.y * kPerThread, column = threadIdx.x * kPerThread;
  for (int64_t first_dim = 0; first_dim < dims; first_dim += kDims) {
    __syncthreads();
    const bool tiny = load_operand(a, mu_a, var_a, first_a, m, first_dim, dims);
    load_operand(b, mu_b, var_b, first_b, n, first_dim, dims);
    if (__syncthreads_or(tiny)) {
      add_dimensions<true>(a, b, row, column, quadratic, log2_product);
    } else {
      add_dimensions<false>(a, b, row, column, quadratic, log2_product);
    }
  }
#pragma unroll
  for (int r = 0; r < kPerThread; ++r) {
#pragma unroll
    for (int c = 0; c < kPerThread; ++c) {
      if (first_a + row + r >= m || first_b + column + c >= n) continue;
      const T sum = quadratic[r][c] + log2_product[r][c] * T(kLn2);
      T score = sum * affine.scale + affine.offset;
      if ((a.infinite[row + r] || b.infinite[column + c]) && score == score) score = -T(INFINITY);
      out[(first_a + row + r) * n + first_b + column + c] = score;
    }
  }
}

// Adds one row y to the gradients of a thread's dimension of rows x.
template <bool kMayClamp, class T>
__device__ __forceinline__ void add_row(const T (&grads)[kRows], T mu_j, T var_j, const T (&mu)[kRows],
                                        const T (&var)[kRows], T (&sum_mu)[kRows], T (&sum_var)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const T sum = var[r] + var_j;
    const bool is_clamped = kMayClamp && sum < T(kMinVariance);
    const T inverse = reciprocal(is_clamped ? T(kMinVariance) : sum), t = (mu[r] - mu_j) * inverse;
    sum_mu[r] -= grads[r] * t;
    sum_var[r] += is_clamped ? T(0) : grads[r] * (t * t - inverse);
  }
}

// The gradient of pair (x, y) lies at x * stride_x + y * stride_y of its batch entry.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(const T* grad, const T* mu_x, const T* var_x, const T* mu_y, const T* var_y, T* grad_mu,
                    T* grad_var, int64_t m, int64_t n, int64_t dims, int64_t stride_x, int64_t stride_y,
                    T scale) {
  __shared__ T grads[kGrads][kRows];
  const int64_t batch = blockIdx.z, first = int64_t(blockIdx.x) * kRows;
  const int64_t dim = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  const bool real = dim < dims;
  grad += batch * m * n;
  mu_y += batch * n * dims + dim;
  var_y += batch * n * dims + dim;
  T mu[kRows], var[kRows], sum_mu[kRows], sum_var[kRows];
  bool tiny = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool inside = real && first + r < m;
    const int64_t at = (batch * m + first + r) * dims + dim;
    mu[r] = inside ? mu_x[at] : T(0);
    var[r] = inside ? cut(var_x[at]) : T(1);
    tiny |= var[r] < T(kMinVariance);
    sum_mu[r] = sum_var[r] = T(0);
  }
  for (int64_t start = 0; start < n; start += kGrads) {
    __syncthreads();
    for (int i = threadIdx.x; i < kGrads * kRows; i += blockDim.x) {
      // The fastest index follows the unit stride, so that the reads coalesce on both sides.
      const int r = stride_x == 1 ? i % kRows : i / kGrads, j = stride_x == 1 ? i / kRows : i % kGrads;
      const bool inside = first + r < m && start + j < n;
      grads[j][r] = inside ? grad[(first + r) * stride_x + (start + j) * stride_y] : T(0);
    }
    __syncthreads();
    const int count = n - start < kGrads ? int(n - start) : kGrads;
    for (int j = 0; j < count; ++j) {
      const T mu_j = real ? mu_y[(start + j) * dims] : T(0);
      const T var_j = real ? cut(var_y[(start + j) * dims]) : T(1);
      if (tiny) {
        add_row<true>(grads[j], mu_j, var_j, mu, var, sum_mu, sum_var);
      } else {
        add_row<false>(grads[j], mu_j, var_j, mu, var, sum_mu, sum_var);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (!real || first + r >= m) continue;
    const int64_t at = (batch * m + first + r) * dims + dim;
    grad_mu[at] = sum_mu[r] * scale;
    grad_var[at] = sum_var[r] * (scale / 2);
  }
}

}  // namespace prcl::cuda::mls
