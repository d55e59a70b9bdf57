// The probability head's tail on the CPU: rows x [P, D], a channel's vectors of D values kept in L1.
//
// A task owns a fixed range of rows, and walks over them in the order of memory; each row is read once a
// pass. What it adds up, it adds in the work type over kRun rows, which bounds the rounding, and over these
// runs in float64. The tasks' results are merged in their order, whatever thread ran them.
//
// The moments of a run are sums of x - k and of its square, k the run's first row. As k is one of the run's
// own values, the square of its distance from the run's mean is at most kRun times the run's sum of squared
// deviations: so is what is lost to cancellation. Runs are merged with the exact formula of Chan et al.
//
// sigma^2 is made from t = 2^-|z / log 2|, in which nothing overflows; 1 / log 2 is part of gain and bias.

#include "cpu/buffer.h"
#include "cpu/convert.h"
#include "cpu/reciprocal.h"
#include "cpu/vector_math.h"
#include "shared/constants.h"
#include "shared/tensor.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace prcl::cpu {
namespace {

constexpr int64_t kRowsPerTask = 512, kRun = 32;

// Room for D values and what a whole vector may read past them.
inline int64_t padded(int64_t dims) { return ceil_div(dims, 16) * 16; }

// Calls f(l, count) for the vectors of a row: `count` lanes from channel l.
template <int64_t kLanes, class F>
PRCL_INLINE void for_vectors(int64_t dims, const F& f) {
  int64_t l = 0;
  for (; l + kLanes <= dims; l += kLanes) f(l, kLanes);
  if (l < dims) f(l, dims - l);
}

// Runs f(task, first row, rows) for all tasks.
template <class F>
void for_tasks(int64_t rows, const F& f) {
  torch::stable::parallel_for(0, ceil_div(rows, kRowsPerTask), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kRowsPerTask;
      f(task, first, std::min(kRowsPerTask, rows - first));
    }
  });
}

// Count, means and sums of squared deviations of two sets of values become those of both together.
PRCL_INLINE void merge(int64_t dims, double count, double* mean, double* squares, double other_count,
                       const double* other_mean, const double* other_squares) {
  const double share = other_count / (count + other_count);
  for (int64_t l = 0; l < dims; ++l) {
    const double distance = other_mean[l] - mean[l];
    mean[l] += distance * share;
    squares[l] += other_squares[l] + distance * distance * count * share;
  }
}

template <class S>
struct MomentsArgs {
  const S* x;
  int64_t rows, dims;
  double *mean, *squares;  // [D], of the task
};

template <class S>
struct Moments {
  using T = Work<S>;

  template <int kBytes>
  PRCL_INLINE static void run(const MomentsArgs<S>& args) {
    using V = typename Vector<T, kBytes>::Type;
    constexpr int64_t kLanes = Vector<T, kBytes>::kLanes;
    const int64_t dims = args.dims, width = padded(dims);
    const Buffer<T> scratch(3 * width);
    T *const shift = scratch.data(), *const sum = shift + width, *const square = sum + width;
    const Buffer<double> run(2 * dims);
    double *const run_mean = run.data(), *const run_squares = run_mean + dims;
    std::fill_n(args.mean, dims, 0.0);
    std::fill_n(args.squares, dims, 0.0);
    for (int64_t first = 0; first < args.rows; first += kRun) {
      const int64_t count = std::min(kRun, args.rows - first);
      const S* x = args.x + first * dims;
      std::fill_n(sum, 2 * width, T(0));
      for_vectors<kLanes>(dims, [&](int64_t l, int64_t lanes) __attribute__((always_inline)) {
        store(shift + l, load_lanes<V>(x + l, lanes));
      });
      for (int64_t i = 1; i < count; ++i) {
        x += dims;
        for_vectors<kLanes>(dims, [&](int64_t l, int64_t lanes) __attribute__((always_inline)) {
          const V difference = load_lanes<V>(x + l, lanes) - load<V>(shift + l);
          store(sum + l, load<V>(sum + l) + difference);
          store(square + l, load<V>(square + l) + difference * difference);
        });
      }
      const double inverse = 1.0 / double(count);
      for (int64_t l = 0; l < dims; ++l) {
        run_mean[l] = double(shift[l]) + double(sum[l]) * inverse;
        run_squares[l] = double(square[l]) - double(sum[l]) * double(sum[l]) * inverse;
      }
      merge(dims, double(first), args.mean, args.squares, double(count), run_mean, run_squares);
    }
  }
};

// Values that all pixels of a channel share, [padded D] each.
template <class T>
class Channels {
 public:
  Channels(const Tensor& mean, const Tensor& var, const Tensor& gamma, const Tensor& beta,
           const Tensor* means, double eps)
      : dims(mean.numel()),
        inverse_std(dims),
        bias(T(double(*beta.const_data_ptr<T>()) * kLog2E)),
        values_(5 * padded(dims)) {
    const double gain = double(*gamma.const_data_ptr<T>());
    const T *m = mean.const_data_ptr<T>(), *v = var.const_data_ptr<T>();
    const T* of_grad = means == nullptr ? nullptr : means->const_data_ptr<T>();
    std::fill_n(values_.data(), 5 * padded(dims), T(0));
    for (int64_t l = 0; l < dims; ++l) {
      inverse_std[l] = 1 / std::sqrt(double(v[l]) + eps);
      const double gain_here = gain * inverse_std[l];
      at(0)[l] = m[l];
      at(1)[l] = T(gain_here * kLog2E);
      at(2)[l] = T(gain_here);
      if (of_grad == nullptr) continue;
      at(3)[l] = T(gain_here * double(of_grad[l]));
      at(4)[l] = T(gain_here * inverse_std[l] * double(of_grad[dims + l]));
    }
  }
  const T* mean() const { return at(0); }
  const T* scale() const { return at(1); }     // z / log 2 = (x - mean) * scale + bias
  const T* gain() const { return at(2); }      // dz/dx for constant moments
  const T* constant() const { return at(3); }  // what the moments take from the gradient, the same everywhere
  const T* slope() const { return at(4); }     // and in proportion to x - mean

  const int64_t dims;
  std::vector<double> inverse_std;
  const T bias;

 private:
  T* at(int64_t i) const { return values_.data() + i * padded(dims); }
  Buffer<T> values_;
};

// d = 1 + (1 + f) t for z > 0, and else (1 + f) + t.
template <class T, class Traits>
struct Sigmoid {
  using V = typename Traits::Type;

  PRCL_INLINE explicit Sigmoid(V z)
      : positive(z > T(0)), t(exp2<T, Traits>(positive ? -z : z)), inverse(reciprocal(denominator())) {}
  PRCL_INLINE V value() const {
    return (positive ? T(1) + T(kVarianceFloor) * t : T(kVarianceFloor) + t) * inverse;
  }
  PRCL_INLINE V slope() const { return t * inverse * inverse; }

  typename Traits::Bits positive;
  V t, inverse;

 private:
  PRCL_INLINE V denominator() const {
    return positive ? T(1) + T(1 + kVarianceFloor) * t : T(1 + kVarianceFloor) + t;
  }
};

template <class S, class O>
struct ForwardArgs {
  const Channels<Work<S>>& channels;
  const S* x;
  int64_t rows;
  O* y;
};

template <class S, class O>
struct Forward {
  using T = Work<S>;

  template <int kBytes>
  PRCL_INLINE static void run(const ForwardArgs<S, O>& args) {
    using Traits = Vector<T, kBytes>;
    using V = typename Traits::Type;
    const int64_t dims = args.channels.dims;
    const T *const mean = args.channels.mean(), *const scale = args.channels.scale();
    const T bias = args.channels.bias;
    for (int64_t i = 0; i < args.rows; ++i) {
      const S* const x = args.x + i * dims;
      O* const y = args.y + i * dims;
      for_vectors<Traits::kLanes>(dims, [&](int64_t l, int64_t lanes) __attribute__((always_inline)) {
        const V centred = load_lanes<V>(x + l, lanes) - load<V>(mean + l);
        store_lanes(y + l, lanes, Sigmoid<T, Traits>(centred * load<V>(scale + l) + bias).value());
      });
    }
  }
};

template <class S, class O>
struct BackwardSumsArgs {
  const Channels<Work<S>>& channels;
  const O* grad;
  const S* x;
  int64_t rows;
  double* sums;  // [2, D], of dz and of dz * (x - mean)
};

template <class S, class O>
struct BackwardSums {
  using T = Work<S>;

  template <int kBytes>
  PRCL_INLINE static void run(const BackwardSumsArgs<S, O>& args) {
    using Traits = Vector<T, kBytes>;
    using V = typename Traits::Type;
    const int64_t dims = args.channels.dims, width = padded(dims);
    const T *const mean = args.channels.mean(), *const scale = args.channels.scale();
    const T bias = args.channels.bias;
    const Buffer<T> run(2 * width);
    T *const sum = run.data(), *const product = sum + width;
    std::fill_n(args.sums, 2 * dims, 0.0);
    for (int64_t first = 0; first < args.rows; first += kRun) {
      const int64_t last = std::min(first + kRun, args.rows);
      std::fill_n(sum, 2 * width, T(0));
      for (int64_t i = first; i < last; ++i) {
        const S* const x = args.x + i * dims;
        const O* const grad = args.grad + i * dims;
        for_vectors<Traits::kLanes>(dims, [&](int64_t l, int64_t lanes) __attribute__((always_inline)) {
          const V centred = load_lanes<V>(x + l, lanes) - load<V>(mean + l);
          const Sigmoid<T, Traits> sigmoid(centred * load<V>(scale + l) + bias);
          const V grad_z = load_lanes<V>(grad + l, lanes) * sigmoid.slope();
          store(sum + l, load<V>(sum + l) + grad_z);
          store(product + l, load<V>(product + l) + grad_z * centred);
        });
      }
      for (int64_t l = 0; l < dims; ++l) args.sums[l] += double(sum[l]);
      for (int64_t l = 0; l < dims; ++l) args.sums[dims + l] += double(product[l]);
    }
  }
};

template <class S, class O>
struct BackwardArgs {
  const Channels<Work<S>>& channels;
  const O* grad;
  const S* x;
  int64_t rows;
  S* grad_x;
};

template <class S, class O>
struct Backward {
  using T = Work<S>;

  template <int kBytes>
  PRCL_INLINE static void run(const BackwardArgs<S, O>& args) {
    using Traits = Vector<T, kBytes>;
    using V = typename Traits::Type;
    const Channels<T>& of = args.channels;
    const int64_t dims = of.dims;
    const T *const mean = of.mean(), *const scale = of.scale(), *const gain = of.gain();
    const T *const constant = of.constant(), *const slope = of.slope();
    const T bias = of.bias;
    for (int64_t i = 0; i < args.rows; ++i) {
      const S* const x = args.x + i * dims;
      const O* const grad = args.grad + i * dims;
      S* const grad_x = args.grad_x + i * dims;
      for_vectors<Traits::kLanes>(dims, [&](int64_t l, int64_t lanes) __attribute__((always_inline)) {
        const V centred = load_lanes<V>(x + l, lanes) - load<V>(mean + l);
        const Sigmoid<T, Traits> sigmoid(centred * load<V>(scale + l) + bias);
        const V grad_z = load_lanes<V>(grad + l, lanes) * sigmoid.slope();
        store_lanes(grad_x + l, lanes,
                    grad_z * load<V>(gain + l) - load<V>(constant + l) - centred * load<V>(slope + l));
      });
    }
  }
};

std::tuple<Tensor, Tensor> variance_head_moments(Tensor x) {
  const int64_t rows = x.size(0), dims = x.size(1), tasks = ceil_div(rows, kRowsPerTask);
  std::vector<double> partial(tasks * 2 * dims);
  Tensor mean, var;
  dispatch_floating(x, [&](auto zero) {
    using S = decltype(zero);
    using T = Work<S>;
    mean = empty_like_of(x, {dims}, kWorkType<S>);
    var = empty_like_of(x, {dims}, kWorkType<S>);
    const S* from = x.const_data_ptr<S>();
    for_tasks(rows, [&](int64_t task, int64_t first, int64_t count) {
      double* to = partial.data() + task * 2 * dims;
      dispatch<Moments<S>>(MomentsArgs<S>{from + first * dims, count, dims, to, to + dims});
    });
    double *all_mean = partial.data(), *all_squares = all_mean + dims;
    for (int64_t task = 1; task < tasks; ++task) {
      const int64_t first = task * kRowsPerTask;
      const double* of_task = partial.data() + task * 2 * dims;
      merge(dims, double(first), all_mean, all_squares, double(std::min(kRowsPerTask, rows - first)), of_task,
            of_task + dims);
    }
    for (int64_t l = 0; l < dims; ++l) mean.mutable_data_ptr<T>()[l] = T(all_mean[l]);
    for (int64_t l = 0; l < dims; ++l) var.mutable_data_ptr<T>()[l] = T(all_squares[l] / double(rows));
  });
  return {mean, var};
}

Tensor variance_head(Tensor x, Tensor mean, Tensor var, Tensor gamma, Tensor beta, double eps,
                     ScalarType dtype) {
  const int64_t rows = x.size(0), dims = x.size(1);
  Tensor y = empty_like_of(x, {rows, dims}, dtype);
  dispatch_floating_with(x, dtype, [&](auto zero, auto other) {
    using S = decltype(zero);
    using O = decltype(other);
    const Channels<Work<S>> channels(mean, var, gamma, beta, nullptr, eps);
    const S* from = x.const_data_ptr<S>();
    O* to = y.mutable_data_ptr<O>();
    for_tasks(rows, [&](int64_t, int64_t first, int64_t count) {
      dispatch<Forward<S, O>>(ForwardArgs<S, O>{channels, from + first * dims, count, to + first * dims});
    });
  });
  return y;
}

Tensor variance_head_backward_sums(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor gamma, Tensor beta,
                                   double eps) {
  const int64_t rows = x.size(0), dims = x.size(1), tasks = ceil_div(rows, kRowsPerTask);
  std::vector<double> partial(tasks * 2 * dims);
  Tensor sums = empty_like_of(mean, {2, dims});
  dispatch_floating_with(x, grad.scalar_type(), [&](auto zero, auto other) {
    using S = decltype(zero);
    using O = decltype(other);
    using T = Work<S>;
    const Channels<T> channels(mean, var, gamma, beta, nullptr, eps);
    const S* from = x.const_data_ptr<S>();
    const O* from_grad = grad.const_data_ptr<O>();
    for_tasks(rows, [&](int64_t task, int64_t first, int64_t count) {
      dispatch<BackwardSums<S, O>>(BackwardSumsArgs<S, O>{
          channels, from_grad + first * dims, from + first * dims, count, partial.data() + task * 2 * dims});
    });
    for (int64_t task = 1; task < tasks; ++task) {
      for (int64_t k = 0; k < 2 * dims; ++k) partial[k] += partial[task * 2 * dims + k];
    }
    T* to = sums.mutable_data_ptr<T>();
    for (int64_t l = 0; l < dims; ++l) to[l] = T(partial[l]);
    for (int64_t l = 0; l < dims; ++l) to[dims + l] = T(partial[dims + l] * channels.inverse_std[l]);
  });
  return sums;
}

Tensor variance_head_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor gamma, Tensor beta,
                              std::optional<Tensor> means, double eps) {
  const int64_t rows = x.size(0), dims = x.size(1);
  Tensor grad_x = empty_like_of(x, {rows, dims});
  dispatch_floating_with(x, grad.scalar_type(), [&](auto zero, auto other) {
    using S = decltype(zero);
    using O = decltype(other);
    const Channels<Work<S>> channels(mean, var, gamma, beta, means ? &*means : nullptr, eps);
    const S* from = x.const_data_ptr<S>();
    const O* from_grad = grad.const_data_ptr<O>();
    S* to = grad_x.mutable_data_ptr<S>();
    for_tasks(rows, [&](int64_t, int64_t first, int64_t count) {
      dispatch<Backward<S, O>>(BackwardArgs<S, O>{channels, from_grad + first * dims, from + first * dims,
                                                  count, to + first * dims});
    });
  });
  return grad_x;
}

}  // namespace
}  // namespace prcl::cpu

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CPU, m) {
  m.impl("variance_head_moments", TORCH_BOX(&prcl::cpu::variance_head_moments));
  m.impl("variance_head", TORCH_BOX(&prcl::cpu::variance_head));
  m.impl("variance_head_backward_sums", TORCH_BOX(&prcl::cpu::variance_head_backward_sums));
  m.impl("variance_head_backward", TORCH_BOX(&prcl::cpu::variance_head_backward));
}
