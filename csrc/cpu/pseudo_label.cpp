// Pseudo-labels on the CPU: argmax and maximum of the softmax of bilinearly upsampled logits.
//
// A task owns a strip of output rows (upsampling.h). For one vector of output pixels it makes the
// logits of all classes once, kept in L1, with their running maximum and its class, and then sums
// 2^(l - maximum), whose reciprocal is the confidence. Only the two results are written.

#include "cpu/upsampling.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

namespace prcl::cpu {
namespace {

template <class S>
struct PseudoLabelArgs {
  Upsampling<S> up;
  int64_t begin, end;  // intervals
  uint8_t* label;      // [H, W]
  float* confidence;
};

template <class S>
struct PseudoLabel {
  using T = Work<S>;

  template <int kBytes>
  PRCL_INLINE static void run(const PseudoLabelArgs<S>& args) {
    using Traits = Vector<T, kBytes>;
    using V = typename Traits::Type;
    using Bits = typename Traits::Bits;
    constexpr int64_t kLanes = Traits::kLanes;
    const Upsampling<S>& up = args.up;
    const int64_t num_classes = up.num_classes, width = up.columns.output;
    RowPair<S> pair(up);
    const Buffer<T> logits(up.tile_size());

    for (int64_t y = args.begin; y < args.end; ++y) {
      const int64_t first = up.intervals.begin[y], last = up.intervals.begin[y + 1];
      if (first == last) continue;
      const T* top = pair.template get<kBytes>(up, y);
      const T* bottom = pair.template get<kBytes>(up, std::min(y + 1, up.rows() - 1));
      for (int64_t x = 0; x < width; x += kLanes, top += up.tile_size(), bottom += up.tile_size()) {
        const int64_t count = std::min(kLanes, width - x);
        for (int64_t row = first; row < last; ++row) {
          const T bottom_weight = up.intervals.fraction[row], top_weight = T(1) - bottom_weight;
          V highest = V{} - std::numeric_limits<T>::infinity();
          Bits best{}, id{};
          for (int64_t c = 0; c < num_classes; ++c, id += 1) {
            const V l = load<V>(top + c * kLanes) * top_weight + load<V>(bottom + c * kLanes) * bottom_weight;
            store(logits.data() + c * kLanes, l);
            const Bits higher = l > highest;
            best = higher ? id : best;
            highest = higher ? l : highest;
          }
          V sum{};
          for (int64_t c = 0; c < num_classes; ++c) {
            sum += exp2<T, Traits>(load<V>(logits.data() + c * kLanes) - highest);
          }
          T share[kLanes];
          typename Columns<T>::Index id_of[kLanes];
          store(share, T(1) / sum);
          store(id_of, best);
          uint8_t label[kLanes];
          float confidence[kLanes];
          for (int64_t i = 0; i < kLanes; ++i) label[i] = uint8_t(id_of[i]);
          for (int64_t i = 0; i < kLanes; ++i) confidence[i] = float(share[i]);
          copy_lanes<kLanes>(label, count, args.label + row * width + x);
          copy_lanes<kLanes>(confidence, count, args.confidence + row * width + x);
        }
      }
    }
  }
};

std::tuple<Tensor, Tensor> pseudo_label(Tensor logits, int64_t height, int64_t width) {
  const int64_t batch = logits.size(0), pixels = height * width;
  Tensor label = empty_like_of(logits, {batch, height, width}, ScalarType::Byte);
  Tensor confidence = empty_like_of(logits, {batch, height, width}, ScalarType::Float);
  uint8_t* to_label = label.mutable_data_ptr<uint8_t>();
  float* to_confidence = confidence.mutable_data_ptr<float>();
  const Axis<double> vertical(logits.size(2), height);
  const Axis<double> horizontal(logits.size(3), width);
  const Strips strips(batch, vertical);
  dispatch_floating(logits, [&](auto zero) {
    using S = decltype(zero);
    using T = Work<S>;
    const Columns<T> columns(horizontal, vector_bytes() / int64_t(sizeof(T)));
    const Intervals<T> intervals(vertical);
    const S* from = logits.const_data_ptr<S>();
    torch::stable::parallel_for(0, strips.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t image = strips.image(strip);
        dispatch<PseudoLabel<S>>(
            PseudoLabelArgs<S>{{columns, intervals, from + image * logits.stride(0), logits.size(1),
                                logits.stride(1), logits.stride(2), logits.stride(3)},
                               strips.begin(strip),
                               strips.end(strip),
                               to_label + image * pixels,
                               to_confidence + image * pixels});
      }
    });
  });
  return {label, confidence};
}

}  // namespace
}  // namespace prcl::cpu

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CPU, m) {
  m.impl("pseudo_label", TORCH_BOX(&prcl::cpu::pseudo_label));
}
