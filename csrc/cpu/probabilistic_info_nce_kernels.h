// Probabilistic InfoNCE on the CPU: the loss and gradients of one group of anchors that share their negatives
// (a group of one where each has its own).
//
// The candidates of an anchor (its prototype first, then its negatives, then the virtual negatives of the
// other known classes) pass in batches of kBatch rows, prefetched a batch ahead; a batch stays in L1 while
// all anchors of the group pass over it. For each pair the first pass makes the score and, when gradients are
// wanted, per dimension t = (mu_j - mu_i) r and u = t^2 - r with r = 1 / (s_i + s_j), also kept in L1. The
// second adds w t and w u to the anchor's sums, w = exp(score - highest): an online softmax, the sums being
// rescaled when the highest score rises. The positive stays out of them: its weight, softmax minus one, is
// minus the sum of the others', which leaves nothing to cancel. Two dimensions share a division; the
// logarithm is that of the product of all s_i + s_j, kept as mantissas and exponents. All sums run in the
// order of the candidates.
//
// Rows are padded to whole pairs of vectors, with equal means and variances of one half: such dimensions add
// nothing to a score.
#pragma once

#include "cpu/buffer.h"
#include "cpu/convert.h"
#include "cpu/reciprocal.h"
#include "cpu/vector_math.h"
#include "shared/constants.h"
#include "shared/norm.h"
#include "shared/tensor.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace prcl::cpu::info_nce {

constexpr int kBatch = 8;
constexpr double kPadding = 0.5;
// Candidates so far below the highest score do not count: a 1e-30th of the sum is far below its rounding, and
// their products would be subnormal numbers, which processors are slow at.
constexpr double kFaint = -69.0;

// Operands that all groups share. Mu and Var are the types of means and variances, T = Work<Mu>.
template <class Mu, class Var>
struct Problem {
  using T = Work<Mu>;
  const Mu* mu;  // [P, D]
  const Var* var;
  const T* inverse_norm;       // [P], or null where means are not normalised
  const int64_t* anchors;      // [C, A]
  const int64_t* negatives;    // [C, G, N]
  const T* prototype_mu;       // [C, width], normalised where means are
  const T* prototype_var;      // [C, width]
  const T* virtual_mu;         // [C, V, width]
  const T* virtual_var;        // [C, V, width], or one row for all
  int64_t virtual_var_stride;  // from row to row, 0 for one
  const bool* virtual_known;   // [C], null without virtual negatives
  const double* class_weight;  // [C], of each drawn anchor's loss
  int64_t num_classes, num_anchors, num_groups, num_negatives, num_virtual, dims, width;
  T scale;  // of a score: 1 / tau, over D for the mean
  bool needs_grad;
  double* loss;  // [C, A], weighted
  T* grad_mu;    // [C, A, D], zero at first
  T* grad_var;
};

// Sums of one anchor.
template <class T>
struct State {
  T *mu, *var;                   // [width], of the anchor
  T *sum_t, *sum_u;              // [width], weighted by exp(score - highest)
  T *first_t, *first_u;          // [width], of the positive
  T positive, highest, weights;  // two scores, and the sum of the negatives' exp(score - highest)
  int64_t anchor;                // in [C, A]
  bool may_clamp;
};

template <class T>
struct Batch {
  const T* mu[kBatch];
  const T* var[kBatch];
  T inverse_norm[kBatch];
  int count;
};

// Q and the product of all s_i + s_j, for each pair of a batch. Their logarithms are taken together.
template <class T>
struct Sums {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  alignas(64) T quadratic[kBatch] = {};
  alignas(64) T mantissa[kBatch] = {};
  alignas(64) Bits exponent[kBatch] = {};  // unbiased
};

// One pair's part of `sums`, and t and u of each dimension where kGrad.
template <int kBytes, bool kGrad, bool kClamp, class T>
PRCL_INLINE void add_pair(const State<T>& anchor, const T* mu, const T* var, T inverse_norm, int64_t width,
                          T* to_t, T* to_u, int i, Sums<T>& sums) {
  using Traits = Vector<T, kBytes>;
  using V = typename Traits::Type;
  using Bits = typename Traits::Bits;
  constexpr int64_t kLanes = Traits::kLanes;
  constexpr int64_t kChunk = 64;  // pairs of vectors between two splits of the product, of factors below 2
  const V smallest = V{} + T(kMinVariance);
  const V zero{};
  V quadratic0{}, quadratic1{}, product = V{} + T(1);
  Bits exponent{};
  int64_t splits = 0;
  for (int64_t begin = 0; begin < width; begin += kChunk * 2 * kLanes) {
    const int64_t end = std::min(begin + kChunk * 2 * kLanes, width);
    for (int64_t l = begin; l < end; l += 2 * kLanes) {
      const V sum0 = load<V>(anchor.var + l) + load<V>(var + l);
      const V sum1 = load<V>(anchor.var + l + kLanes) + load<V>(var + l + kLanes);
      const V s0 = kClamp ? (sum0 < smallest ? smallest : sum0) : sum0;
      const V s1 = kClamp ? (sum1 < smallest ? smallest : sum1) : sum1;
      const V d0 = load<V>(mu + l) * inverse_norm - load<V>(anchor.mu + l);
      const V d1 = load<V>(mu + l + kLanes) * inverse_norm - load<V>(anchor.mu + l + kLanes);
      const V p = s0 * s1, inverse = reciprocal(p);
      const V r0 = s1 * inverse, r1 = s0 * inverse;
      const V t0 = d0 * r0, t1 = d1 * r1;
      quadratic0 += d0 * t0;
      quadratic1 += d1 * t1;
      product *= split<Traits>(p, exponent);
      if (kGrad) {
        const V u0 = t0 * t0 - r0, u1 = t1 * t1 - r1;
        store(to_t + l, t0);
        store(to_t + l + kLanes, t1);
        store(to_u + l, kClamp ? (sum0 < smallest ? zero : u0) : u0);
        store(to_u + l + kLanes, kClamp ? (sum1 < smallest ? zero : u1) : u1);
      }
    }
    product = split<Traits>(product, exponent);
    splits += (end - begin) / (2 * kLanes) + 1;
  }
  const auto add = [](auto a, auto b) { return a + b; };
  const auto multiply = [](auto a, auto b) { return a * b; };
  sums.quadratic[i] = combine<T>(V(quadratic0 + quadratic1), add);
  sums.mantissa[i] = combine<T>(product, multiply);
  sums.exponent[i] = combine<typename Sums<T>::Bits>(exponent, add) -
                     typename Sums<T>::Bits(splits * kLanes * Traits::kBias);
}

// Scores -1/2 (Q + L) of a batch.
template <int kBytes, class T>
PRCL_INLINE void scores_of(const Sums<T>& sums, T scale, T* score) {
  using Traits = Vector<T, kBytes>;
  using V = typename Traits::Type;
  using Bits = typename Traits::Bits;
  for (int i = 0; i < kBatch; i += Traits::kLanes) {
    V quadratic = V{}, mantissa = V{} + T(1);
    Bits exponent{};
    const size_t bytes = std::min(sizeof(V), sizeof(T) * (kBatch - i));
    std::memcpy(&quadratic, sums.quadratic + i, bytes);
    std::memcpy(&mantissa, sums.mantissa + i, bytes);
    std::memcpy(&exponent, sums.exponent + i, bytes);
    mantissa = split<Traits>(mantissa, exponent);
    const V log = log_of<T, Traits>(mantissa, exponent - Traits::kBias);
    const V value = (quadratic + log) * (T(-0.5) * scale);
    std::memcpy(score + i, &value, bytes);
  }
}

// exp(score - highest) of a batch; 0 below exp(kFaint).
template <int kBytes, class T>
PRCL_INLINE void weights_of(const T* score, T highest, T* weight) {
  using Traits = Vector<T, kBytes>;
  using V = typename Traits::Type;
  for (int i = 0; i < kBatch; i += Traits::kLanes) {
    const size_t bytes = std::min(sizeof(V), sizeof(T) * (kBatch - i));
    V x{};
    std::memcpy(&x, score + i, bytes);
    x -= highest;
    const V e = x < T(kFaint) ? V{} : exp2<T, Traits>(x * T(kLog2E));
    std::memcpy(weight + i, &e, bytes);
  }
}

template <class Mu, class Var>
struct Group {
  using T = Work<Mu>;

  struct Args {
    const Problem<Mu, Var>& problem;
    int64_t group;  // in [C, G]
  };

  template <int kBytes>
  PRCL_INLINE static void run(const Args& args) {
    using V = typename Vector<T, kBytes>::Type;
    const Problem<Mu, Var>& p = args.problem;
    const int64_t c = args.group / p.num_groups, size = p.num_anchors / p.num_groups, width = p.width;
    const int64_t rows = p.needs_grad ? 6 : 2;
    const Buffer<T> memory(size * rows * width + 4 * kBatch * width);
    T* const t = memory.data() + size * rows * width;  // [kBatch, width]
    T* const u = t + kBatch * width;
    T* const converted = u + kBatch * width;  // mu and var rows of a batch that are not used where they lie

    std::vector<State<T>> states;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t anchor = args.group * size + i, pixel = p.anchors[anchor];
      if (pixel < 0) continue;
      T* const at = memory.data() + int64_t(states.size()) * rows * width;
      State<T> state{at, at + width, at + 2 * width, at + 3 * width, at + 4 * width, at + 5 * width, 0,
                     0,  0,          anchor,         false};
      convert_row<V>(p.mu + pixel * p.dims, p.dims, T(0), width, state.mu);
      convert_row<V>(p.var + pixel * p.dims, p.dims, T(kPadding), width, state.var);
      const T norm = p.inverse_norm != nullptr ? p.inverse_norm[pixel] : T(1);
      for (int64_t l = 0; l < width; ++l) {
        state.mu[l] *= norm;
        state.may_clamp |= !(state.var[l] > T(kMinVariance));
      }
      states.push_back(state);
    }
    if (states.empty()) return;

    Batch<T> batch{{p.prototype_mu + c * width}, {p.prototype_var + c * width}, {T(1)}, 1};
    for (State<T>& state : states) pass<kBytes>(p, state, batch, t, u, /*positive=*/true);

    const int64_t* negative = p.negatives + args.group * p.num_negatives;
    const int64_t* const last = negative + p.num_negatives;
    while (negative < last) {
      batch.count = 0;
      for (; negative < last && batch.count < kBatch; ++negative) {
        if (*negative >= 0) add_pixel<V>(p, *negative, converted, batch);
      }
      for (const int64_t* next = negative; next < std::min(negative + kBatch, last); ++next) {
        if (*next >= 0) prefetch(p, *next);
      }
      for (State<T>& state : states) pass<kBytes>(p, state, batch, t, u, false);
    }

    batch.count = 0;
    for (int64_t v = 0; v < p.num_classes * p.num_virtual; ++v) {
      if (v / p.num_virtual == c || !p.virtual_known[v / p.num_virtual]) continue;
      batch.mu[batch.count] = p.virtual_mu + v * width;
      batch.var[batch.count] = p.virtual_var + v * p.virtual_var_stride;
      batch.inverse_norm[batch.count++] = T(1);
      if (batch.count < kBatch) continue;
      for (State<T>& state : states) pass<kBytes>(p, state, batch, t, u, false);
      batch.count = 0;
    }
    for (State<T>& state : states) pass<kBytes>(p, state, batch, t, u, false);

    for (const State<T>& state : states) finish(p, state, p.class_weight[c]);
  }

  template <class V>
  PRCL_INLINE static void add_pixel(const Problem<Mu, Var>& p, int64_t pixel, T* converted, Batch<T>& batch) {
    const int i = batch.count++;
    T* const to = converted + 2 * i * p.width;
    batch.inverse_norm[i] = p.inverse_norm != nullptr ? p.inverse_norm[pixel] : T(1);
    batch.mu[i] = row<V>(p.mu + pixel * p.dims, p, T(0), to);
    batch.var[i] = row<V>(p.var + pixel * p.dims, p, T(kPadding), to + p.width);
  }

  // The row where it lies, if it can be used there, or converted and padded in `to`.
  template <class V, class S>
  PRCL_INLINE static const T* row(const S* from, const Problem<Mu, Var>& p, T padding, T* to) {
    if constexpr (std::is_same_v<S, T>) {
      if (p.dims == p.width) return from;
    }
    convert_row<V>(from, p.dims, padding, p.width, to);
    return to;
  }

  PRCL_INLINE static void prefetch(const Problem<Mu, Var>& p, int64_t pixel) {
    prefetch_row(p.mu + pixel * p.dims, p.dims);
    prefetch_row(p.var + pixel * p.dims, p.dims);
  }

  template <class S>
  PRCL_INLINE static void prefetch_row(const S* row, int64_t dims) {
    constexpr int64_t kLine = 64 / sizeof(S);
    for (int64_t l = 0; l < dims; l += kLine) __builtin_prefetch(row + l);
  }

  template <int kBytes>
  PRCL_INLINE static void pass(const Problem<Mu, Var>& p, State<T>& state, const Batch<T>& batch, T* t, T* u,
                               bool positive) {
    if (!p.needs_grad) return pass_as<kBytes, false, true>(p, state, batch, t, u, positive);
    if (state.may_clamp) return pass_as<kBytes, true, true>(p, state, batch, t, u, positive);
    pass_as<kBytes, true, false>(p, state, batch, t, u, positive);
  }

  // The candidates of one batch for one anchor.
  template <int kBytes, bool kGrad, bool kClamp>
  PRCL_INLINE static void pass_as(const Problem<Mu, Var>& p, State<T>& state, const Batch<T>& batch, T* t,
                                  T* u, bool positive) {
    using V = typename Vector<T, kBytes>::Type;
    constexpr int64_t kLanes = Vector<T, kBytes>::kLanes;
    const int64_t width = p.width;
    Sums<T> sums;
    T score[kBatch], weight[kBatch];
    T highest = state.highest;
    for (int i = 0; i < batch.count; ++i) {
      add_pair<kBytes, kGrad, kClamp>(state, batch.mu[i], batch.var[i], batch.inverse_norm[i], width,
                                      t + i * width, u + i * width, i, sums);
    }
    scores_of<kBytes>(sums, p.scale, score);
    for (int i = 0; i < batch.count; ++i) highest = std::max(highest, score[i]);
    if (positive) {
      state.positive = state.highest = score[0];
      if (kGrad) {
        std::copy_n(t, width, state.first_t);
        std::copy_n(u, width, state.first_u);
        std::fill_n(state.sum_t, width, T(0));
        std::fill_n(state.sum_u, width, T(0));
      }
      return;
    }
    const T shrink = highest > state.highest ? std::exp(std::max(state.highest - highest, T(kFaint))) : T(1);
    state.highest = highest;
    state.weights *= shrink;
    weights_of<kBytes>(score, highest, weight);
    for (int i = 0; i < batch.count; ++i) state.weights += weight[i];
    if (!kGrad) return;
    for (int64_t l = 0; l < width; l += kLanes) {
      V sum_t = load<V>(state.sum_t + l) * shrink, sum_u = load<V>(state.sum_u + l) * shrink;
      for (int i = 0; i < batch.count; ++i) {
        sum_t += load<V>(t + i * width + l) * weight[i];
        sum_u += load<V>(u + i * width + l) * weight[i];
      }
      store(state.sum_t + l, sum_t);
      store(state.sum_u + l, sum_u);
    }
  }

  // The anchor's loss and, from its sums, the rows of its gradients.
  PRCL_INLINE static void finish(const Problem<Mu, Var>& p, const State<T>& state, double class_weight) {
    const T rise = state.highest - state.positive, total = state.weights + std::exp(-rise);
    // The first form is exact where the positive dominates, the second where exp(rise) would overflow.
    const T loss = rise < T(32) ? std::log1p(state.weights * std::exp(rise)) : rise + std::log(total);
    p.loss[state.anchor] = class_weight * double(loss);
    if (!p.needs_grad) return;
    const T factor = T(class_weight) * p.scale / total;
    T *grad_mu = p.grad_mu + state.anchor * p.dims, *grad_var = p.grad_var + state.anchor * p.dims;
    T along = 0;
    for (int64_t l = 0; l < p.dims; ++l) {
      grad_mu[l] = (state.sum_t[l] - state.weights * state.first_t[l]) * factor;
      grad_var[l] = (state.sum_u[l] - state.weights * state.first_u[l]) * (factor / 2);
      along += state.mu[l] * grad_mu[l];
    }
    if (p.inverse_norm == nullptr) return;
    // d (mu / |mu|): the part across mu, over |mu|. Below its clamp the norm counts as a constant.
    const T inverse_norm = p.inverse_norm[p.anchors[state.anchor]];
    if (norm_is_clamped(inverse_norm)) along = 0;
    for (int64_t l = 0; l < p.dims; ++l) grad_mu[l] = (grad_mu[l] - along * state.mu[l]) * inverse_norm;
  }
};

}  // namespace prcl::cpu::info_nce
