// The CUDA kernel of the probabilistic InfoNCE: loss and gradients in one pass over an anchor's candidates.
//
// One warp owns one anchor; a lane holds kPerLane of its channels, with the two sums of gradients, in
// registers. The warp reads kRows candidates at a time, 16 bytes a lane and load, each row once. With t =
// (mu_j - mu_i) r, r = 1 / (s_i + s_j) and u = t^2 - r the score is -1/2 sum [(mu_j - mu_i) t + log(s_i +
// s_j)], and an online softmax keeps the largest logit so far, the sum of the negatives' weights w and, per
// channel, the sums of w t and w u; they are rescaled only where the largest logit rises. The positive is no
// part of these sums: its weight, softmax minus one, is minus the sum of the others', which leaves nothing to
// cancel.
//
// A block's anchors follow each other, so that those which share their negatives walk down the same list at
// the same time and find each other's rows in the L1 cache: sharing needs no other kernel.
//
// Order of sums: candidates ascending, kRows of them as a tree; channels of a lane ascending, then a tree
// over the lanes. Logs are taken of products of two sums s, which are safe from 1e-12 to 1e18; logits are
// kept in powers of two.
#pragma once

#include "cuda/approximate.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector_load.cuh"
#include "shared/constants.h"
#include "shared/norm.h"

namespace prcl::cuda::info_nce {

constexpr float kMinVariance = float(prcl::kMinVariance);
constexpr float kLn2 = float(prcl::kLn2);
constexpr int kWarps = 8;  // anchors per block

template <class Mu, class Var>
struct Problem {
  const Mu* mu;                                    // [P, D]
  const Var* var;                                  // [P, D]
  const int64_t *anchor_index, *negative_index;    // [C, A], [C, G, N]
  const float *positive_mean, *positive_variance;  // [C, D]
  const float *virtual_mu, *virtual_var;           // [C, V, D]; no variances: 0
  const bool* virtual_known;                       // [C], null without virtual negatives
  const float *inverse_norm, *positive_inverse_norm,
      *virtual_inverse_norm;  // null where nothing is normalised
  const float* class_weight;  // [C]
  int classes, anchors, groups, negatives, virtuals, dims;
  bool aligned;              // rows of every tensor can be read 16 bytes at a time
  float scale, logit_scale;  // 1 / tau, over D too for the mean; what turns -2 score into a logit
  float *anchor_loss, *grad_mu, *grad_var;  // [C * A], [C, A, D] or null
};

// The channels of a lane: slice k holds kWidth consecutive ones, a vector of means, k * kSliceChannels after
// the first.
template <class Mu, int kPerLane>
struct Layout {
  static constexpr int kWidth = kVector<Mu>, kSlices = kPerLane / kWidth, kSliceChannels = 32 * kWidth;
  // Rows in flight: as many as make 32 values of t and of u, which live in registers.
  static constexpr int kRows = 32 / kPerLane;
  static_assert(kSlices >= 1 && kRows >= 1, "a lane holds whole vectors and at most 32 channels");
  static __device__ __forceinline__ int first_channel() { return int(threadIdx.x) % 32 * kWidth; }
};

template <int kPerLane>
struct Row {
  float mu[kPerLane], var[kPerLane];
};

struct Candidate {
  int row;             // -1: left out
  float inverse_norm;  // what its mean is multiplied by
};

// Start of a row.
template <int kPerLane, bool kFull>
__device__ __forceinline__ int64_t offset(int row, int dims) {
  return int64_t(uint64_t(uint32_t(row)) * uint32_t(kFull ? 32 * kPerLane : dims));
}

// kFull: rows are exactly 32 * kPerLane channels long and aligned, so that loads need no mask. `from` is
// `channel` channels into its row.
template <class S, bool kFull>
__device__ __forceinline__ Vector<S> load_part(const S* from, int channel, int dims, float fill,
                                               bool aligned) {
  if constexpr (kFull) return load(from);
  return load(from, dims - channel, fill, aligned);
}

// Rows of float32 values in the layout of means of type Mu; `from` is at the lane's first channel.
template <class Mu, int kPerLane, bool kFull>
__device__ __forceinline__ void load_floats(const float* from, int dims, bool aligned,
                                            float (&to)[kPerLane]) {
  using L = Layout<Mu, kPerLane>;
#pragma unroll
  for (int i = 0; i < kPerLane; i += 4) {
    const int step = i / L::kWidth * L::kSliceChannels + i % L::kWidth;
    float values[4];
    unpack(load_part<float, kFull>(from + step, L::first_channel() + step, dims, 0.0f, aligned), values);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[i + j] = values[j];
  }
}

// Pixels: means and variances as the network made them. Channels past D get variance `fill`.
template <class Mu, class Var, int kPerLane, bool kFull>
struct PixelRows {
  using L = Layout<Mu, kPerLane>;
  struct Raw {
    Vector<Mu> mu[L::kSlices];
    Values<Var, L::kWidth> var[L::kSlices];
  };
  const Mu* mu;  // at the lane's first channel of row 0
  const Var* var;
  const float* inverse_norm;
  const int64_t* index;
  int dims;
  bool aligned;

  __device__ __forceinline__ Candidate candidate(int i) const {
    const int row = int(index[i]);
    return {row, row >= 0 && inverse_norm != nullptr ? inverse_norm[row] : 1.0f};
  }
  __device__ __forceinline__ Raw fetch(int row, float fill) const {
    Raw raw;
    const int64_t at = offset<kPerLane, kFull>(row, dims);
    const Mu* mu_row = mu + at;
    const Var* var_row = var + at;
#pragma unroll
    for (int k = 0; k < L::kSlices; ++k) {
      const int step = k * L::kSliceChannels, channel = L::first_channel() + step;
      raw.mu[k] = load_part<Mu, kFull>(mu_row + step, channel, dims, 0.0f, aligned);
#pragma unroll
      for (int j = 0; j < L::kWidth; j += kVector<Var>) {
        raw.var[k].part[j / kVector<Var>] =
            load_part<Var, kFull>(var_row + step + j, channel + j, dims, fill, aligned);
      }
    }
    return raw;
  }
  __device__ __forceinline__ static void convert(const Raw& raw, Row<kPerLane>& to) {
#pragma unroll
    for (int k = 0; k < L::kSlices; ++k) {
      float mu[L::kWidth], var[L::kWidth];
      unpack(raw.mu[k], mu);
      unpack(raw.var[k], var);
#pragma unroll
      for (int j = 0; j < L::kWidth; ++j) {
        to.mu[k * L::kWidth + j] = mu[j];
        to.var[k * L::kWidth + j] = var[j];
      }
    }
  }
};

// Virtual negatives of the known classes but the anchor's, float32; points, of variance 0, without `var`.
// Variances are read as late as they are used: there are no registers for those of all rows in flight.
template <class Mu, int kPerLane, bool kFull>
struct VirtualRows {
  struct Raw {
    float mu[kPerLane];
    int row;
  };
  const float* mu;  // at the lane's first channel of row 0
  const float* var;
  const float* inverse_norm;
  const bool* known;
  int per_class, anchor_class, dims;
  bool aligned;

  __device__ __forceinline__ Candidate candidate(int i) const {
    const int c = i / per_class;
    const bool usable = c != anchor_class && known[c];
    return {usable ? i : -1, usable && inverse_norm != nullptr ? inverse_norm[i] : 1.0f};
  }
  __device__ __forceinline__ Raw fetch(int row, float) const {
    Raw raw;
    load_floats<Mu, kPerLane, kFull>(mu + offset<kPerLane, kFull>(row, dims), dims, aligned, raw.mu);
    raw.row = row;
    return raw;
  }
  __device__ __forceinline__ void convert(const Raw& raw, Row<kPerLane>& to) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      to.mu[i] = raw.mu[i];
      to.var[i] = 0.0f;
    }
    if (var == nullptr) return;
    load_floats<Mu, kPerLane, kFull>(var + offset<kPerLane, kFull>(raw.row, dims), dims, aligned, to.var);
  }
};

// t and u of one candidate and this lane's part of -2 score.
template <bool kMayClamp, int kPerLane>
__device__ __forceinline__ float pair_terms(const Row<kPerLane>& anchor, const Row<kPerLane>& other,
                                            float inverse_norm, float (&t)[kPerLane], float (&u)[kPerLane]) {
  float quadratic = 0.0f, log2_product = 0.0f, former = 1.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    float s = anchor.var[i] + other.var[i];
    const bool clamped = kMayClamp && s <= kMinVariance;
    if (clamped) s = kMinVariance;
    const float r = approximate_reciprocal(s), d = fmaf(other.mu[i], inverse_norm, -anchor.mu[i]);
    t[i] = d * r;
    u[i] = clamped ? 0.0f : fmaf(t[i], t[i], -r);
    quadratic = fmaf(d, t[i], quadratic);
    if (i % 2 == 0) {
      former = s;
    } else {
      log2_product += approximate_log2(former * s);
    }
  }
  return fmaf(log2_product, kLn2, quadratic);
}

template <int kPerLane>
struct Running {
  float maximum;  // the largest logit so far, in powers of two
  float weights;  // lane l: the sum of the weights of the rows that it got from warp_sums
  float grad_mu[kPerLane], grad_var[kPerLane];
};

template <bool kMayClamp, class Rows, int kRows, int kPerLane>
__device__ __forceinline__ void add_rows(const Rows& rows, const Candidate& mine, int first, unsigned usable,
                                         float logit_scale, const Row<kPerLane>& anchor,
                                         Running<kPerLane>& running) {
  const int lane = int(threadIdx.x) % 32;
  typename Rows::Raw raw[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) raw[r] = rows.fetch(__shfl_sync(kAllLanes, mine.row, first + r), 0.0f);
  float t[kRows][kPerLane], u[kRows][kPerLane], part[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    Row<kPerLane> other;
    rows.convert(raw[r], other);
    const float inverse_norm = __shfl_sync(kAllLanes, mine.inverse_norm, first + r);
    part[r] = pair_terms<kMayClamp>(anchor, other, inverse_norm, t[r], u[r]);
  }
  float logit = warp_sums(part) * logit_scale;
  if (!(usable >> (first + lane % kRows) & 1)) logit = -INFINITY;
  float highest = logit;
#pragma unroll
  for (int step = 1; step < kRows; step *= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, step));
  }
  if (highest > running.maximum) {
    const float rescale = approximate_exp2(running.maximum - highest);
    running.maximum = highest;
    running.weights *= rescale;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      running.grad_mu[i] *= rescale;
      running.grad_var[i] *= rescale;
    }
  }
  const float weight = approximate_exp2(logit - running.maximum);
  running.weights += weight;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float w = __shfl_sync(kAllLanes, weight, r);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      running.grad_mu[i] = fmaf(w, t[r][i], running.grad_mu[i]);
      running.grad_var[i] = fmaf(w, u[r][i], running.grad_var[i]);
    }
  }
}

// Walks over candidates 0 .. count - 1; lane l looks up every 32nd of them, one step ahead of its use.
template <bool kMayClamp, class Rows, int kRows, int kPerLane>
__device__ __forceinline__ void add_candidates(const Rows& rows, int count, float logit_scale,
                                               const Row<kPerLane>& anchor, Running<kPerLane>& running) {
  const int lane = int(threadIdx.x) % 32;
  const auto look_up = [&](int i) { return i < count ? rows.candidate(i) : Candidate{-1, 1.0f}; };
  Candidate next = look_up(lane);
  for (int base = 0; base < count; base += 32) {
    Candidate mine = next;
    next = look_up(base + 32 + lane);
    const unsigned usable = __ballot_sync(kAllLanes, mine.row >= 0);
    if (usable == 0) continue;
    // A candidate that counts stands in for one that does not: as finite as the rest, and masked later.
    const int source = mine.row >= 0 ? lane : __ffs(int(usable)) - 1;
    mine.row = __shfl_sync(kAllLanes, mine.row, source);
    mine.inverse_norm = __shfl_sync(kAllLanes, mine.inverse_norm, source);
#pragma unroll 1
    for (int first = 0; first < 32; first += kRows) {
      if ((usable >> first & ((1u << kRows) - 1)) == 0) continue;
      add_rows<kMayClamp, Rows, kRows>(rows, mine, first, usable, logit_scale, anchor, running);
    }
  }
}

template <class Mu, int kPerLane>
__device__ __forceinline__ void store_row(float* row, int dims, const float (&values)[kPerLane]) {
  using L = Layout<Mu, kPerLane>;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int channel = L::first_channel() + i / L::kWidth * L::kSliceChannels + i % L::kWidth;
    if (channel < dims) row[channel] = values[i];
  }
}

// kMayClamp: some variance of the anchor is so small that a sum may have to be clamped.
template <class Mu, class Var, int kPerLane, bool kFull, bool kMayClamp>
__device__ __forceinline__ void contrast(const Problem<Mu, Var>& p, int a, const Row<kPerLane>& anchor,
                                         const PixelRows<Mu, Var, kPerLane, kFull>& pixels) {
  using L = Layout<Mu, kPerLane>;
  constexpr int kRows = L::kRows;
  // Makes t, u and the logit of the positive: first for its logit, at the end again for its gradients.
  const auto positive = [&](float (&t)[kPerLane], float (&u)[kPerLane]) {
    Row<kPerLane> row;
    const int c = a / p.anchors;
    const int64_t at = int64_t(c) * p.dims + L::first_channel();
    load_floats<Mu, kPerLane, kFull>(p.positive_mean + at, p.dims, p.aligned, row.mu);
    load_floats<Mu, kPerLane, kFull>(p.positive_variance + at, p.dims, p.aligned, row.var);
    const float inverse_norm = p.positive_inverse_norm != nullptr ? p.positive_inverse_norm[c] : 1.0f;
    return warp_sum(pair_terms<kMayClamp>(anchor, row, inverse_norm, t, u)) * p.logit_scale;
  };
  float t[kPerLane], u[kPerLane];
  Running<kPerLane> running = {};
  running.maximum = positive(t, u);
  add_candidates<kMayClamp, PixelRows<Mu, Var, kPerLane, kFull>, kRows>(pixels, p.negatives, p.logit_scale,
                                                                        anchor, running);
  const float* const virtual_var = p.virtual_var != nullptr ? p.virtual_var + L::first_channel() : nullptr;
  const VirtualRows<Mu, kPerLane, kFull> virtuals = {p.virtual_mu + L::first_channel(),
                                                     virtual_var,
                                                     p.virtual_inverse_norm,
                                                     p.virtual_known,
                                                     p.virtuals,
                                                     a / p.anchors,
                                                     p.dims,
                                                     p.aligned};
  add_candidates<kMayClamp, VirtualRows<Mu, kPerLane, kFull>, kRows>(virtuals, p.classes * p.virtuals,
                                                                     p.logit_scale, anchor, running);

  float negatives = running.weights;
#pragma unroll
  for (int step = 1; step < kRows; step *= 2) negatives += __shfl_xor_sync(kAllLanes, negatives, step);
  const float class_weight = p.class_weight[a / p.anchors];
  const float rise = running.maximum - positive(t, u), total = negatives + approximate_exp2(-rise);
  if (threadIdx.x % 32 == 0) {
    const float loss = rise < 32.0f ? log1pf(negatives * approximate_exp2(rise)) : rise * kLn2 + logf(total);
    p.anchor_loss[a] = class_weight * loss;
  }
  if (p.grad_mu == nullptr) return;

  const float factor = class_weight * p.scale / total;
  float along = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    t[i] = (running.grad_mu[i] - negatives * t[i]) * factor;
    u[i] = (running.grad_var[i] - negatives * u[i]) * (0.5f * factor);
    along = fmaf(anchor.mu[i], t[i], along);
  }
  if (p.inverse_norm != nullptr) {
    // d(mu / |mu|): the part across mu, over |mu|. Below the clamp the norm counts as a constant.
    const float inverse_norm = p.inverse_norm[p.anchor_index[a]];
    along = norm_is_clamped(inverse_norm) ? 0.0f : warp_sum(along);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) t[i] = (t[i] - along * anchor.mu[i]) * inverse_norm;
  }
  store_row<Mu>(p.grad_mu + int64_t(a) * p.dims, p.dims, t);
  store_row<Mu>(p.grad_var + int64_t(a) * p.dims, p.dims, u);
}

template <class Mu, class Var, int kPerLane, bool kFull>
__global__ void __launch_bounds__(kWarps * 32, kPerLane == 8 ? 2 : 1) info_nce_kernel(Problem<Mu, Var> p) {
  using L = Layout<Mu, kPerLane>;
  const int a = int(blockIdx.x) * kWarps + int(threadIdx.x) / 32;
  if (a >= p.classes * p.anchors) return;
  const int c = a / p.anchors, group = a / (p.anchors / p.groups);
  const int64_t pixel = p.anchor_index[a];
  if (pixel < 0 || p.class_weight[c] == 0.0f) {
    if (threadIdx.x % 32 == 0) p.anchor_loss[a] = 0.0f;
    if (p.grad_mu == nullptr) return;
    const float zeros[kPerLane] = {};
    store_row<Mu>(p.grad_mu + int64_t(a) * p.dims, p.dims, zeros);
    store_row<Mu>(p.grad_var + int64_t(a) * p.dims, p.dims, zeros);
    return;
  }
  const PixelRows<Mu, Var, kPerLane, kFull> pixels = {p.mu + L::first_channel(),
                                                      p.var + L::first_channel(),
                                                      p.inverse_norm,
                                                      p.negative_index + int64_t(group) * p.negatives,
                                                      p.dims,
                                                      p.aligned};
  Row<kPerLane> anchor;
  // Variance 1 past the last channel: with a candidate's 0 there the channel adds nothing.
  pixels.convert(pixels.fetch(int(pixel), 1.0f), anchor);
  const float inverse_norm = p.inverse_norm != nullptr ? p.inverse_norm[pixel] : 1.0f;
  bool tiny = false;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    anchor.mu[i] *= inverse_norm;
    tiny |= anchor.var[i] <= kMinVariance;
  }
  if constexpr (kPerLane == 8) {
    if (!__any_sync(kAllLanes, tiny)) {
      return contrast<Mu, Var, kPerLane, kFull, false>(p, a, anchor, pixels);
    }
  }
  contrast<Mu, Var, kPerLane, kFull, true>(p, a, anchor,
                                           pixels);  // the only one for many dimensions: less to compile
}

}  // namespace prcl::cuda::info_nce
