// The vector kernels of the mutual likelihood score, for one batch entry and a range of its rows.
//
// Forward: one vector holds the scores of one row a against kLanes rows b, so b is packed by tiles [D,
// kLanes]; a register block is kRows rows by one tile, and a tile stays in L1 while all rows of the range
// pass over it. The logarithm of the product of all D sums is kept as a product of mantissas in [1, 2) and a
// sum of exponents: one logarithm a score, and less rounding than D of them.
//
// Backward, one side: gradients of rows x from all rows y, with one vector over kLanes dimensions; x and y
// are packed by tiles [rows, kLanes]. Sums run over y in ascending order in one thread: deterministic for any
// thread count.
#pragma once

#include "cpu/vector_math.h"
#include "shared/mls.h"

#include <algorithm>
#include <limits>

namespace prcl::cpu::mls {

using prcl::mls::Affine;

template <class T>
struct ForwardArgs {
  const T* mu_a;              // [M, D]
  const T* var_a;             // [M, D], cut at kMaxVariance
  const T* mu_b;              // [tiles, D, kLanes]
  const T* var_b;             // the same, cut at kMaxVariance
  const uint8_t* infinite_a;  // [M]
  const uint8_t* infinite_b;  // [N]
  T* out;                     // [M, N]
  int64_t row_begin, row_end, n, dims;
  Affine<T> affine;
};

template <class T>
struct Forward {
  template <int kBytes>
  PRCL_INLINE static void run(const ForwardArgs<T>& args) {
    using Traits = Vector<T, kBytes>;
    using V = typename Traits::Type;
    using Bits = typename Traits::Bits;
    constexpr int kLanes = Traits::kLanes;
    constexpr int kRows = kBytes == 64 ? 4 : 2;  // as many as the registers hold
    constexpr int64_t kChunk = 128;  // dimensions between two splits of the product: 64 factors below 2
    const int64_t dims = args.dims;
    const V smallest = V{} + T(kMinVariance);

    for (int64_t first = 0, tile = 0; first < args.n; first += kLanes, ++tile) {
      const T* mu_tile = args.mu_b + tile * dims * kLanes;
      const T* var_tile = args.var_b + tile * dims * kLanes;
      for (int64_t row = args.row_begin; row < args.row_end; row += kRows) {
        const T *mu[kRows], *var[kRows];
        V quadratic[kRows], product[kRows];
        Bits exponent[kRows];
        for (int r = 0; r < kRows; ++r) {
          const int64_t source = std::min(row + r, args.row_end - 1);
          mu[r] = args.mu_a + source * dims;
          var[r] = args.var_a + source * dims;
          quadratic[r] = V{};
          product[r] = V{} + T(1);
          exponent[r] = Bits{};
        }
        int64_t splits = 0;
        for (int64_t begin = 0; begin < dims; begin += kChunk) {
          const int64_t end = std::min(begin + kChunk, dims);
          int64_t l = begin;
          for (; l + 2 <= end; l += 2) {
            const V mu0 = load<V>(mu_tile + l * kLanes), mu1 = load<V>(mu_tile + (l + 1) * kLanes);
            const V var0 = load<V>(var_tile + l * kLanes), var1 = load<V>(var_tile + (l + 1) * kLanes);
            for (int r = 0; r < kRows; ++r) {
              V s0 = var0 + var[r][l], s1 = var1 + var[r][l + 1];
              s0 = s0 < smallest ? smallest : s0;
              s1 = s1 < smallest ? smallest : s1;
              const V d0 = mu0 - mu[r][l], d1 = mu1 - mu[r][l + 1];
              const V p = s0 * s1;
              quadratic[r] += (d0 * d0 * s1 + d1 * d1 * s0) / p;
              product[r] *= split<Traits>(p, exponent[r]);
            }
          }
          splits += (l - begin) / 2;
          if (l < end) {
            for (int r = 0; r < kRows; ++r) {
              V s = load<V>(var_tile + l * kLanes) + var[r][l];
              s = s < smallest ? smallest : s;
              const V d = load<V>(mu_tile + l * kLanes) - mu[r][l];
              quadratic[r] += d * d / s;
              product[r] *= split<Traits>(s, exponent[r]);
            }
            ++splits;
          }
          for (int r = 0; r < kRows; ++r) product[r] = split<Traits>(product[r], exponent[r]);
          ++splits;
        }
        for (int r = 0; r < kRows && row + r < args.row_end; ++r) {
          const auto unbiased = exponent[r] - (Traits::kBias * decltype(Traits::kBias)(splits));
          const V sum = quadratic[r] + log_of<T, Traits>(product[r], unbiased);
          T score[kLanes];
          store(score, sum * args.affine.scale + args.affine.offset);
          const int64_t columns = std::min<int64_t>(kLanes, args.n - first);
          for (int64_t c = 0; c < columns; ++c) {
            const bool infinite = args.infinite_a[row + r] || args.infinite_b[first + c];
            const T value = infinite && score[c] == score[c] ? -std::numeric_limits<T>::infinity() : score[c];
            args.out[(row + r) * args.n + first + c] = value;
          }
        }
      }
    }
  }
};

template <class T>
struct BackwardArgs {
  const T* mu_x;   // [tiles, M, kLanes]
  const T* var_x;  // the same, cut at kMaxVariance
  const T* mu_y;   // [tiles, N, kLanes]
  const T* var_y;
  const T* grad;  // the gradient of pair (x, y) at x * stride_x + y * stride_y
  T* grad_mu;     // [M, D]
  T* grad_var;
  int64_t row_begin, row_end, m, n, dims, stride_x, stride_y;
  T scale;
};

template <class T>
struct BackwardOneSide {
  template <int kBytes>
  PRCL_INLINE static void run(const BackwardArgs<T>& args) {
    using V = typename Vector<T, kBytes>::Type;
    constexpr int kLanes = Vector<T, kBytes>::kLanes;
    constexpr int kRows = 4;
    const V smallest = V{} + T(kMinVariance);
    const V zero = V{};

    for (int64_t first = 0, tile = 0; first < args.dims; first += kLanes, ++tile) {
      for (int64_t row = args.row_begin; row < args.row_end; row += kRows) {
        V mu[kRows], var[kRows], sum_mu[kRows], sum_var[kRows];
        const T* grad[kRows];
        for (int r = 0; r < kRows; ++r) {
          const int64_t source = std::min(row + r, args.row_end - 1);
          mu[r] = load<V>(args.mu_x + (tile * args.m + source) * kLanes);
          var[r] = load<V>(args.var_x + (tile * args.m + source) * kLanes);
          grad[r] = args.grad + source * args.stride_x;
          sum_mu[r] = sum_var[r] = zero;
        }
        for (int64_t j = 0; j < args.n; ++j) {
          const V mu_j = load<V>(args.mu_y + (tile * args.n + j) * kLanes);
          const V var_j = load<V>(args.var_y + (tile * args.n + j) * kLanes);
          for (int r = 0; r < kRows; r += 2) {
            const V sum0 = var[r] + var_j, sum1 = var[r + 1] + var_j;
            const V s0 = sum0 < smallest ? smallest : sum0, s1 = sum1 < smallest ? smallest : sum1;
            const V inverse = T(1) / (s0 * s1);
            const V r0 = s1 * inverse, r1 = s0 * inverse;
            const V t0 = (mu[r] - mu_j) * r0, t1 = (mu[r + 1] - mu_j) * r1;
            const T g0 = grad[r][j * args.stride_y], g1 = grad[r + 1][j * args.stride_y];
            sum_mu[r] -= t0 * g0;
            sum_mu[r + 1] -= t1 * g1;
            sum_var[r] += (sum0 < smallest ? zero : t0 * t0 - r0) * g0;
            sum_var[r + 1] += (sum1 < smallest ? zero : t1 * t1 - r1) * g1;
          }
        }
        const int64_t width = std::min<int64_t>(kLanes, args.dims - first);
        for (int r = 0; r < kRows && row + r < args.row_end; ++r) {
          T lanes[2][kLanes];
          store(lanes[0], sum_mu[r] * args.scale);
          store(lanes[1], sum_var[r] * (args.scale / 2));
          const int64_t at = (row + r) * args.dims + first;
          std::copy_n(lanes[0], width, args.grad_mu + at);
          std::copy_n(lanes[1], width, args.grad_var + at);
        }
      }
    }
  }
};

}  // namespace prcl::cpu::mls
