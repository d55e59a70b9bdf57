// Probabilistic InfoNCE on the CPU: pads the prototypes and virtual negatives, then shares the groups of
// anchors among threads (the arithmetic is in probabilistic_info_nce_kernels.h). The anchors' losses are
// added in their order, whatever thread made them. The backward op writes the anchors' rows, sorted by pixel,
// into zeros.

#include "cpu/inverse_norm.h"
#include "cpu/probabilistic_info_nce_kernels.h"

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <tuple>

namespace prcl::cpu {
namespace {

using torch::stable::parallel_for;

// 1 / |mu| of every pixel, the norm clamped.
template <class S>
struct InverseNorms {
  struct Args {
    const S* mu;  // [P, D]
    int64_t begin, end, dims;
    Work<S>* to;
  };

  template <int kBytes>
  PRCL_INLINE static void run(const Args& args) {
    using T = Work<S>;
    for (int64_t i = args.begin; i < args.end; ++i) {
      args.to[i] = inverse_norm_of<kBytes, T>(args.mu + i * args.dims, args.dims);
    }
  }
};

// Rows [n, D] padded to [n, width], each normalised if asked for.
template <class T>
Buffer<T> padded(const T* from, int64_t rows, int64_t dims, int64_t width, T fill, bool normalize) {
  Buffer<T> to(rows * width);
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = from + i * dims;
    const T square = normalize ? std::inner_product(row, row + dims, row, T(0)) : T(1);
    const T norm = std::max(std::sqrt(square), T(kMinNorm));
    T* out = to.data() + i * width;
    for (int64_t l = 0; l < dims; ++l) out[l] = row[l] / norm;
    std::fill(out + dims, out + width, fill);
  }
  return to;
}

// Weight of each drawn anchor's loss: the class's factor / (its drawn anchors * classes present).
std::vector<double> class_weights(const int64_t* anchors, const std::vector<uint8_t>& present,
                                  int64_t num_anchors, const std::vector<double>& factor) {
  const auto num_present = std::accumulate(present.begin(), present.end(), int64_t(0));
  std::vector<double> weight(present.size());
  for (size_t c = 0; c < present.size(); ++c) {
    const int64_t* row = anchors + int64_t(c) * num_anchors;
    const auto drawn = std::count_if(row, row + num_anchors, [](int64_t index) { return index >= 0; });
    if (drawn > 0 && present[c]) weight[c] = factor[c] / (double(drawn) * double(num_present));
  }
  return weight;
}

std::tuple<Tensor, Tensor, Tensor> probabilistic_info_nce(
    Tensor mu, Tensor var, Tensor anchor_index, Tensor negative_index, Tensor positive_mean,
    Tensor positive_variance, Tensor positive_count, std::optional<Tensor> virtual_mu,
    std::optional<Tensor> virtual_var, std::optional<Tensor> virtual_known,
    std::optional<Tensor> class_factor, std::optional<Tensor> inverse_norm, double tau, bool mean,
    bool normalize, bool needs_grad) {
  const int64_t pixels = mu.size(0), dims = mu.size(1), num_classes = anchor_index.size(0),
                num_anchors = anchor_index.size(1), num_groups = negative_index.size(1),
                num_virtual = virtual_mu ? virtual_mu->size(1) : 0;
  const int64_t* count = positive_count.const_data_ptr<int64_t>();
  std::vector<uint8_t> present(num_classes);
  for (int64_t c = 0; c < num_classes; ++c) present[c] = count[c] > 0;
  std::vector<double> factor(num_classes, 1.0);
  if (class_factor && class_factor->scalar_type() == ScalarType::Double) {
    std::copy_n(class_factor->const_data_ptr<double>(), num_classes, factor.begin());
  } else if (class_factor) {
    std::copy_n(class_factor->const_data_ptr<float>(), num_classes, factor.begin());
  }
  const std::vector<double> weight =
      class_weights(anchor_index.const_data_ptr<int64_t>(), present, num_anchors, factor);
  std::vector<double> losses(num_classes * num_anchors);
  std::vector<int64_t> groups;
  for (int64_t group = 0; group < num_classes * num_groups; ++group) {
    if (weight[group / num_groups] > 0) groups.push_back(group);
  }

  Tensor loss = empty_like_of(positive_mean, {}), grad_mu = loss, grad_var = loss;
  dispatch_features(mu, var, [&](auto of_mu, auto of_var) {
    using Mu = decltype(of_mu);
    using Var = decltype(of_var);
    using T = Work<Mu>;
    for (Tensor* grad : {&grad_mu, &grad_var}) {
      *grad = needs_grad ? empty_like_of(loss, {num_classes, num_anchors, dims}) : empty_like_of(loss, {0});
      torch::stable::zero_(*grad);
    }
    const int64_t step = 2 * vector_bytes() / int64_t(sizeof(T)), width = ceil_div(dims, step) * step;
    const bool find_norms = normalize && !inverse_norm;
    const Buffer<T> found_norms(find_norms ? pixels : 0);
    if (find_norms) {
      parallel_for(0, pixels, 1024, [&](int64_t begin, int64_t end) {
        dispatch<InverseNorms<Mu>>(
            typename InverseNorms<Mu>::Args{mu.const_data_ptr<Mu>(), begin, end, dims, found_norms.data()});
      });
    }
    const T* const norms = find_norms  ? found_norms.data()
                           : normalize ? inverse_norm->const_data_ptr<T>()
                                       : nullptr;
    const T padding = T(info_nce::kPadding);
    const Buffer<T> prototype_mu =
        padded(positive_mean.const_data_ptr<T>(), num_classes, dims, width, T(0), normalize);
    const Buffer<T> prototype_var =
        padded(positive_variance.const_data_ptr<T>(), num_classes, dims, width, padding, false);
    const Buffer<T> virtual_rows = padded(virtual_mu ? virtual_mu->const_data_ptr<T>() : nullptr,
                                          num_classes * num_virtual, dims, width, T(0), normalize);
    // Points share one row of zeros.
    const std::vector<T> zeros(dims);
    const Buffer<T> virtual_variances =
        virtual_var
            ? padded(virtual_var->const_data_ptr<T>(), num_classes * num_virtual, dims, width, padding, false)
            : padded(zeros.data(), 1, dims, width, padding, false);
    const info_nce::Problem<Mu, Var> problem{mu.const_data_ptr<Mu>(),
                                             var.const_data_ptr<Var>(),
                                             norms,
                                             anchor_index.const_data_ptr<int64_t>(),
                                             negative_index.const_data_ptr<int64_t>(),
                                             prototype_mu.data(),
                                             prototype_var.data(),
                                             virtual_rows.data(),
                                             virtual_variances.data(),
                                             virtual_var ? width : 0,
                                             virtual_known ? virtual_known->const_data_ptr<bool>() : nullptr,
                                             weight.data(),
                                             num_classes,
                                             num_anchors,
                                             num_groups,
                                             negative_index.size(2),
                                             num_virtual,
                                             dims,
                                             width,
                                             T(1.0 / (mean ? tau * double(dims) : tau)),
                                             needs_grad,
                                             losses.data(),
                                             needs_grad ? grad_mu.mutable_data_ptr<T>() : nullptr,
                                             needs_grad ? grad_var.mutable_data_ptr<T>() : nullptr};
    parallel_for(0, int64_t(groups.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        dispatch<info_nce::Group<Mu, Var>>(typename info_nce::Group<Mu, Var>::Args{problem, groups[i]});
      }
    });
    *loss.mutable_data_ptr<T>() = T(std::accumulate(losses.begin(), losses.end(), 0.0));
  });
  return {loss, grad_mu, grad_var};
}

// Adds the rows that belong to one pixel, in ascending order of the anchors, and writes their sum.
template <class S>
void scatter(const Work<S>* rows, Work<S> factor, const std::vector<std::pair<int64_t, int64_t>>& drawn,
             int64_t dims, int64_t pixels_per_image, bool channels_last, S* to) {
  std::vector<Work<S>> sum(dims);
  for (size_t i = 0; i < drawn.size();) {
    const int64_t pixel = drawn[i].first;
    std::fill(sum.begin(), sum.end(), Work<S>(0));
    for (; i < drawn.size() && drawn[i].first == pixel; ++i) {
      const Work<S>* row = rows + drawn[i].second * dims;
      for (int64_t l = 0; l < dims; ++l) sum[l] += row[l] * factor;
    }
    const int64_t image = pixel / pixels_per_image;
    const int64_t first =
        channels_last ? pixel * dims : image * dims * pixels_per_image + pixel % pixels_per_image;
    const int64_t stride = channels_last ? 1 : pixels_per_image;
    for (int64_t l = 0; l < dims; ++l) to[first + l * stride] = S(sum[l]);
  }
}

std::tuple<Tensor, Tensor> probabilistic_info_nce_backward(Tensor grad_loss, Tensor grad_mu_rows,
                                                           Tensor grad_var_rows, Tensor anchor_index,
                                                           int64_t batch, int64_t height, int64_t width,
                                                           ScalarType mu_dtype, ScalarType var_dtype,
                                                           bool mu_channels_last, bool var_channels_last) {
  const int64_t dims = grad_mu_rows.size(2), anchors = anchor_index.numel();
  const int64_t* index = anchor_index.const_data_ptr<int64_t>();
  std::vector<std::pair<int64_t, int64_t>> drawn;  // pixel, anchor
  for (int64_t i = 0; i < anchors; ++i) {
    if (index[i] >= 0) drawn.emplace_back(index[i], i);
  }
  std::sort(drawn.begin(), drawn.end());

  const auto one = [&](const Tensor& rows, ScalarType dtype, bool channels_last) {
    // Channels last is a permuted view of [B, h, w, D].
    Tensor full = channels_last ? empty_like_of(rows, {batch, height, width, dims}, dtype)
                                : empty_like_of(rows, {batch, dims, height, width}, dtype);
    dispatch_floating(full, [&](auto zero) {
      using S = decltype(zero);
      S* to = full.mutable_data_ptr<S>();
      parallel_for(0, full.numel(), 1 << 20, [&](int64_t begin, int64_t end) {
        std::memset(static_cast<void*>(to + begin), 0, (end - begin) * sizeof(S));
      });
      scatter(rows.const_data_ptr<Work<S>>(), *grad_loss.const_data_ptr<Work<S>>(), drawn, dims,
              height * width, channels_last, to);
    });
    if (!channels_last) return full;
    return torch::stable::transpose(torch::stable::transpose(full, 2, 3), 1, 2);
  };
  return {one(grad_mu_rows, mu_dtype, mu_channels_last), one(grad_var_rows, var_dtype, var_channels_last)};
}

}  // namespace
}  // namespace prcl::cpu

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CPU, m) {
  m.impl("probabilistic_info_nce", TORCH_BOX(&prcl::cpu::probabilistic_info_nce));
  m.impl("probabilistic_info_nce_backward", TORCH_BOX(&prcl::cpu::probabilistic_info_nce_backward));
}
