// Prototype statistics on the CPU: sums of 1 / s and mu / s over each class's valid pixels.
//
// A task owns a fixed range of one image's pixels and a table [C, 2D] of float64 sums. It walks over its
// pixels and adds each row to the sums of the current run of one class, kept in L1 in the work type; a run is
// flushed into the table when the class changes, or after kRun pixels, which bounds the rounding. Rows that
// do not count are never read; the norm of a row is made while it is in L1. Contiguous (NCHW) input is
// transposed into rows a few pixels at a time. The tables are added in the order of the tasks, whatever
// thread ran them.

#include "cpu/buffer.h"
#include "cpu/convert.h"
#include "cpu/inverse_norm.h"
#include "shared/labels.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace prcl::cpu {
namespace {

constexpr int64_t kPixelsPerTask = 4096;
constexpr int64_t kPixelsPerTile = 32;  // transposed at once: 64 KB of rows at D = 256
constexpr int kRun = 64;

template <class Mu, class Var>
struct StatisticsArgs {
  const Mu* mu;  // of the image
  const Var* var;
  const int32_t* label;  // of the task's pixels, -1 where they do not count
  int64_t first, count, dims, pixel_stride, channel_stride;
  double* precision;  // [C, D]
  double* weighted_mean;
  int64_t* counts;         // [C]
  Work<Mu>* inverse_norm;  // of the image's pixels, or null
};

template <class Mu, class Var>
struct Statistics {
  using T = Work<Mu>;

  template <int kBytes>
  PRCL_INLINE static void run(const StatisticsArgs<Mu, Var>& args) {
    using V = typename Vector<T, kBytes>::Type;
    constexpr int64_t kLanes = Vector<T, kBytes>::kLanes;
    const int64_t dims = args.dims;
    const bool transposed = args.channel_stride != 1;
    const Buffer<T> sums(2 * dims);
    const Buffer<Mu> mu_tile(transposed ? kPixelsPerTile * dims : 0);
    const Buffer<Var> var_tile(transposed ? kPixelsPerTile * dims : 0);
    T *precision = sums.data(), *mean = precision + dims;
    int32_t current = -1;
    int run = 0;

    const auto flush = [&]() __attribute__((always_inline)) {
      if (run > 0) {
        double *to_precision = args.precision + current * dims,
               *to_mean = args.weighted_mean + current * dims;
        for (int64_t l = 0; l < dims; ++l) to_precision[l] += double(precision[l]);
        for (int64_t l = 0; l < dims; ++l) to_mean[l] += double(mean[l]);
        args.counts[current] += run;
      }
      std::fill_n(precision, 2 * dims, T(0));
      run = 0;
    };

    flush();
    for (int64_t i = 0; i < args.count; ++i) {
      if (transposed && i % kPixelsPerTile == 0) {
        const int64_t width = std::min(kPixelsPerTile, args.count - i);
        if (std::all_of(args.label + i, args.label + i + width, [](int32_t c) { return c < 0; })) {
          i += width - 1;
          continue;
        }
        transpose(args.mu, args, i, width, mu_tile.data());
        transpose(args.var, args, i, width, var_tile.data());
      }
      const int32_t c = args.label[i];
      if (c < 0) continue;
      if (c != current || run == kRun) {
        flush();
        current = c;
      }
      ++run;
      const int64_t in_tile = i % kPixelsPerTile * dims, in_image = (args.first + i) * args.pixel_stride;
      const Mu* mu = transposed ? mu_tile.data() + in_tile : args.mu + in_image;
      const Var* var = transposed ? var_tile.data() + in_tile : args.var + in_image;
      int64_t l = 0;
      for (; l + kLanes <= dims; l += kLanes) {
        const V r = T(1) / load_as<V>(var + l);
        store(precision + l, load<V>(precision + l) + r);
        store(mean + l, load<V>(mean + l) + load_as<V>(mu + l) * r);
      }
      for (; l < dims; ++l) {
        const T r = T(1) / T(var[l]);
        precision[l] += r;
        mean[l] += T(mu[l]) * r;
      }
      if (args.inverse_norm != nullptr) {
        args.inverse_norm[args.first + i] = inverse_norm_of<kBytes, T>(mu, dims);
      }
    }
    flush();
  }

  // Rows [width, D] of pixels first + i ...
  template <class S>
  PRCL_INLINE static void transpose(const S* from, const StatisticsArgs<Mu, Var>& args, int64_t i,
                                    int64_t width, S* to) {
    for (int64_t l = 0; l < args.dims; ++l) {
      const S* plane = from + l * args.channel_stride + args.first + i;
      for (int64_t j = 0; j < width; ++j) to[j * args.dims + l] = plane[j];
    }
  }
};

// Walks over each image in its order, and so needs no class lists.
std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_statistics(Tensor mu, Tensor var, Tensor label,
                                                                Tensor valid, int64_t num_classes,
                                                                bool with_norms, std::optional<Tensor>,
                                                                std::optional<Tensor>) {
  const int64_t batch = mu.size(0), dims = mu.size(1), pixels = mu.size(2) * mu.size(3);
  const bool rows = !mu.is_contiguous();
  const int64_t tasks_per_image = ceil_div(pixels, kPixelsPerTask), tasks = batch * tasks_per_image;
  const int64_t table = num_classes * dims;
  std::vector<double> sums(tasks * 2 * table);
  std::vector<int64_t> counts(tasks * num_classes);
  const Labels labels = labels_of(label);
  const bool* is_valid = valid.const_data_ptr<bool>();
  Tensor inverse_norm;

  dispatch_features(mu, var, [&](auto of_mu, auto of_var) {
    using Mu = decltype(of_mu);
    using Var = decltype(of_var);
    using T = Work<Mu>;
    inverse_norm = with_norms ? empty_like_of(mu, {batch, mu.size(2), mu.size(3)}, kWorkType<Mu>)
                              : empty_like_of(mu, {0}, kWorkType<Mu>);
    torch::stable::zero_(inverse_norm);
    T* const norms = with_norms ? inverse_norm.mutable_data_ptr<T>() : nullptr;
    const Mu* mu_data = mu.const_data_ptr<Mu>();
    const Var* var_data = var.const_data_ptr<Var>();
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> task_label(kPixelsPerTask);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / tasks_per_image, first = task % tasks_per_image * kPixelsPerTask;
        const int64_t count = std::min(kPixelsPerTask, pixels - first);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t pixel = image * pixels + first + i;
          task_label[i] = is_valid[pixel] ? labels.at(pixel, num_classes) : -1;
        }
        double* to = sums.data() + task * 2 * table;
        const int64_t offset = image * dims * pixels;
        dispatch<Statistics<Mu, Var>>(StatisticsArgs<Mu, Var>{
            mu_data + offset, var_data + offset, task_label.data(), first, count, dims, rows ? dims : 1,
            rows ? 1 : pixels, to, to + table, counts.data() + task * num_classes,
            norms == nullptr ? nullptr : norms + image * pixels});
      }
    });
  });

  Tensor precision = empty_like_of(mu, {num_classes, dims}, ScalarType::Float);
  Tensor weighted_mean = empty_like_of(mu, {num_classes, dims}, ScalarType::Float);
  Tensor count = empty_like_of(mu, {num_classes}, ScalarType::Long);
  float* to[2] = {precision.mutable_data_ptr<float>(), weighted_mean.mutable_data_ptr<float>()};
  for (int64_t i = 0; i < 2 * table; ++i) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += sums[task * 2 * table + i];
    to[i / table][i % table] = float(sum);
  }
  for (int64_t c = 0; c < num_classes; ++c) {
    int64_t sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += counts[task * num_classes + c];
    count.mutable_data_ptr<int64_t>()[c] = sum;
  }
  return {precision, weighted_mean, count, inverse_norm};
}

}  // namespace
}  // namespace prcl::cpu

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CPU, m) {
  m.impl("prototype_statistics", TORCH_BOX(&prcl::cpu::prototype_statistics));
}
