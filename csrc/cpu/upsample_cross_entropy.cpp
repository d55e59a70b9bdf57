// Cross-entropy of bilinearly upsampled logits on the CPU, with its gradient in the same pass.
//
// A task owns a strip of intervals (upsampling.h). For one vector of output pixels it makes the logits
// of all classes once, kept in L1; from their maximum and the sum of 2^(l - maximum) follow the loss and the
// gradient at the output, which is added at once, by its vertical weights, to the gradients of the two input
// rows, kept as tiles. When a strip is done with an input row, the horizontal adjoint adds it to the result.
//
// A strip also adds to the first row of the next one: the even strips run before the odd ones, so that no two
// threads meet and every sum has one order. Losses are summed in float64, each lane of a strip by itself,
// then lanes and strips in ascending order.

#include "cpu/upsampling.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <numeric>
#include <optional>
#include <tuple>

namespace prcl::cpu {
namespace {

constexpr int64_t kElementsPerTask = 1 << 16;  // of targets counted, of gradients set to zero

// The class of each pixel of the batch: uint8 where `bytes` is given, else int64.
struct Targets {
  const uint8_t* bytes;  // [B, H, W]
  const int64_t* longs;
  int64_t ignore_index, num_classes;

  // Writes the classes of pixels first .. first + count - 1, -1 for those that do not count, and up to
  // kLanes. Returns false where none counts.
  template <int64_t kLanes, class Index>
  PRCL_INLINE bool read(int64_t first, int64_t count, Index* to) const {
    return bytes != nullptr ? read_from<kLanes>(bytes + first, count, to)
                            : read_from<kLanes>(longs + first, count, to);
  }

  int64_t count_kept(int64_t begin, int64_t end) const {
    int64_t kept = 0;
    for (int64_t i = begin; i < end; ++i) kept += is_kept(bytes != nullptr ? bytes[i] : longs[i]);
    return kept;
  }

 private:
  PRCL_INLINE bool is_kept(int64_t target) const {
    return target != ignore_index && target >= 0 && target < num_classes;
  }

  template <int64_t kLanes, class L, class Index>
  PRCL_INLINE bool read_from(const L* from, int64_t count, Index* to) const {
    L target[kLanes] = {};
    copy_lanes<kLanes>(from, count, target);
    for (int64_t i = 0; i < kLanes; ++i) to[i] = is_kept(target[i]) ? Index(target[i]) : Index(-1);
    for (int64_t i = count; i < kLanes; ++i) to[i] = -1;
    Index all = -1;
    for (int64_t i = 0; i < kLanes; ++i) all &= to[i];
    return all != -1;
  }
};

template <class S>
struct CrossEntropyArgs {
  using T = Work<S>;
  Upsampling<S> up;
  int64_t begin, end;  // intervals
  const Targets& targets;
  int64_t first_pixel;    // of the image, in the batch
  const T* pixel_weight;  // [B, H, W], or null
  T image_weight;
  T grad_scale;
  T* grad;       // of the image [C, h, w], or null
  double* loss;  // of the strip, zero at first
};

// The gradients of the two input rows of the current interval, as tiles.
template <class S>
class GradientPair {
  using T = Work<S>;

 public:
  GradientPair(const Upsampling<S>& up, T* grad)
      : grad_(grad),
        padded_(grad == nullptr ? 0 : up.padded_row_size()),
        tiles_(grad == nullptr ? 0 : 2 * up.row_size()) {}

  template <int kBytes>
  PRCL_INLINE T* get(const Upsampling<S>& up, int64_t y) {
    if (grad_ == nullptr) return nullptr;
    T* const tiles = tiles_.data() + y % 2 * up.row_size();
    if (held_[y % 2] == y) return tiles;
    flush<kBytes>(up, y % 2);
    held_[y % 2] = y;
    std::fill_n(tiles, up.row_size(), T(0));
    return tiles;
  }

  template <int kBytes>
  PRCL_INLINE void flush(const Upsampling<S>& up, int64_t slot) {
    if (held_[slot] < 0) return;
    add_adjoint_of_row<kBytes>(up.columns, up.num_classes, tiles_.data() + slot * up.row_size(),
                               padded_.data(), grad_ + held_[slot] * up.columns.input,
                               up.rows() * up.columns.input);
    held_[slot] = -1;
  }

 private:
  T* grad_;
  Buffer<T> padded_, tiles_;
  int64_t held_[2] = {-1, -1};
};

template <class S>
struct CrossEntropy {
  using T = Work<S>;

  template <int kBytes>
  PRCL_INLINE static void run(const CrossEntropyArgs<S>& args) {
    using Traits = Vector<T, kBytes>;
    using V = typename Traits::Type;
    using Bits = typename Traits::Bits;
    constexpr int64_t kLanes = Traits::kLanes;
    const Upsampling<S>& up = args.up;
    const int64_t num_classes = up.num_classes, width = up.columns.output, tile_size = up.tile_size();
    RowPair<S> rows(up);
    GradientPair<S> grads(up, args.grad);
    const Buffer<T> values(tile_size);
    double loss[kLanes] = {};

    for (int64_t y = args.begin; y < args.end; ++y) {
      const int64_t first = up.intervals.begin[y], last = up.intervals.begin[y + 1];
      if (first == last) continue;
      const int64_t next = std::min(y + 1, up.rows() - 1);
      const T *top = rows.template get<kBytes>(up, y), *bottom = rows.template get<kBytes>(up, next);
      T *top_grad = grads.template get<kBytes>(up, y), *bottom_grad = grads.template get<kBytes>(up, next);
      for (int64_t x = 0; x < width; x += kLanes) {
        const int64_t count = std::min(kLanes, width - x), tile = x * num_classes;
        for (int64_t row = first; row < last; ++row) {
          const int64_t pixel = args.first_pixel + row * width + x;
          typename Columns<T>::Index target[kLanes];
          if (!args.targets.template read<kLanes>(pixel, count, target)) continue;
          const Bits target_id = load<Bits>(target);
          const V weight = read_weights<V>(args, pixel, count);
          const T bottom_weight = up.intervals.fraction[row], top_weight = T(1) - bottom_weight;

          V highest = V{} - std::numeric_limits<T>::infinity(), at_target{};
          Bits id{};
          for (int64_t c = 0; c < num_classes; ++c, id += 1) {
            const int64_t i = c * kLanes;
            const V l = load<V>(top + tile + i) * top_weight + load<V>(bottom + tile + i) * bottom_weight;
            store(values.data() + i, l);
            highest = l > highest ? l : highest;
            at_target = target_id == id ? l : at_target;
          }
          V sum{};
          for (int64_t i = 0; i < tile_size; i += kLanes) {
            const V e = exp2<T, Traits>(load<V>(values.data() + i) - highest);
            store(values.data() + i, e);
            sum += e;
          }
          const auto kept = target_id >= 0;
          const V pixel_loss = (log<T, Traits>(sum) + (highest - at_target) * T(kLn2)) * weight;
          T lanes[kLanes];
          store(lanes, kept ? pixel_loss : V{});
          for (int64_t i = 0; i < kLanes; ++i) loss[i] += double(lanes[i]);

          if (args.grad == nullptr) continue;
          const V scale = kept ? weight * args.grad_scale : V{}, share = scale / sum;
          id = Bits{};
          for (int64_t c = 0; c < num_classes; ++c, id += 1) {
            const int64_t i = c * kLanes;
            const V e = load<V>(values.data() + i) * share;
            const V g = target_id == id ? e - scale : e;
            store(top_grad + tile + i, load<V>(top_grad + tile + i) + g * top_weight);
            store(bottom_grad + tile + i, load<V>(bottom_grad + tile + i) + g * bottom_weight);
          }
        }
      }
    }
    for (const int64_t slot : {0, 1}) grads.template flush<kBytes>(up, slot);
    for (int64_t i = 0; i < kLanes; ++i) *args.loss += loss[i];
  }

  template <class V>
  PRCL_INLINE static V read_weights(const CrossEntropyArgs<S>& args, int64_t pixel, int64_t count) {
    constexpr int64_t kLanes = sizeof(V) / sizeof(T);
    if (args.pixel_weight == nullptr) return V{} + args.image_weight;
    T weight[kLanes] = {};
    copy_lanes<kLanes>(args.pixel_weight + pixel, count, weight);
    return load<V>(weight);
  }
};

// Calls f(begin, end) for parts of 0 .. count - 1, in parallel.
template <class F>
void for_parts(int64_t count, const F& f) {
  torch::stable::parallel_for(0, ceil_div(count, kElementsPerTask), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      f(i * kElementsPerTask, std::min((i + 1) * kElementsPerTask, count));
    }
  });
}

int64_t count_kept(const Targets& targets, int64_t pixels) {
  std::vector<int64_t> kept(ceil_div(pixels, kElementsPerTask));
  for_parts(pixels, [&](int64_t begin, int64_t end) {
    kept[begin / kElementsPerTask] = targets.count_kept(begin, end);
  });
  return std::accumulate(kept.begin(), kept.end(), int64_t(0));
}

std::tuple<Tensor, Tensor> upsample_cross_entropy(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                                  int64_t ignore_index, bool mean, bool needs_grad) {
  const int64_t batch = logits.size(0), num_classes = logits.size(1);
  const int64_t pixels = target.size(1) * target.size(2);
  const bool is_byte = target.scalar_type() == ScalarType::Byte;
  const Targets targets{is_byte ? target.const_data_ptr<uint8_t>() : nullptr,
                        is_byte ? nullptr : target.const_data_ptr<int64_t>(), ignore_index, num_classes};
  const int64_t divisor = mean ? std::max<int64_t>(count_kept(targets, batch * pixels), 1) : 1;
  const double scale = 1.0 / double(divisor);
  const Axis<double> vertical(logits.size(2), target.size(1));
  const Axis<double> horizontal(logits.size(3), target.size(2));
  const int64_t image_size = num_classes * vertical.input * horizontal.input;
  const Strips strips(batch, vertical);
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  const ScalarType work = is_double ? ScalarType::Double : ScalarType::Float;
  Tensor loss = empty_like_of(logits, {}, work);
  Tensor grad = needs_grad
                    ? empty_like_of(logits, {batch, num_classes, vertical.input, horizontal.input}, work)
                    : empty_like_of(logits, {0}, work);

  dispatch_floating(logits, [&](auto zero) {
    using S = decltype(zero);
    using T = Work<S>;
    const S* from = logits.const_data_ptr<S>();
    const T* weights = weight ? weight->const_data_ptr<T>() : nullptr;
    const bool per_pixel = weight && weight->dim() == 3;
    T* const to = needs_grad ? grad.mutable_data_ptr<T>() : nullptr;
    for_parts(grad.numel(), [=](int64_t begin, int64_t end) { std::fill(to + begin, to + end, T(0)); });
    const Columns<T> columns(horizontal, vector_bytes() / int64_t(sizeof(T)));
    const Intervals<T> intervals(vertical);
    std::vector<double> strip_loss(strips.count);

    const auto run_strip = [&](int64_t strip) {
      const int64_t image = strips.image(strip);
      dispatch<CrossEntropy<S>>(
          CrossEntropyArgs<S>{{columns, intervals, from + image * logits.stride(0), num_classes,
                               logits.stride(1), logits.stride(2), logits.stride(3)},
                              strips.begin(strip),
                              strips.end(strip),
                              targets,
                              image * pixels,
                              per_pixel ? weights : nullptr,
                              weight && !per_pixel ? weights[image] : T(1),
                              T(scale),
                              needs_grad ? to + image * image_size : nullptr,
                              &strip_loss[strip]});
    };
    for (const int64_t odd : {0, 1}) {
      torch::stable::parallel_for(0, (strips.count + 1 - odd) / 2, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) run_strip(2 * i + odd);
      });
    }
    const double sum = std::accumulate(strip_loss.begin(), strip_loss.end(), 0.0);
    *loss.mutable_data_ptr<T>() = T(sum * scale);
  });
  return {loss, grad};
}

}  // namespace
}  // namespace prcl::cpu

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CPU, m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&prcl::cpu::upsample_cross_entropy));
}
