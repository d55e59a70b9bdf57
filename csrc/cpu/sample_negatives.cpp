// Negatives on the CPU, from the class lists of the valid pixels: a cumulative table of integer weights, and
// draws in blocks whose random words are made together, so that the generator runs in vectors. The class of a
// draw is the number of cumulative weights that do not exceed it: counted in vectors, without a branch that
// no one can predict. Draws are shared among threads; each is a function of its position alone.

#include "cpu/isa.h"
#include "shared/philox.h"
#include "shared/tensor.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace prcl::cpu {
namespace {

constexpr int kBlock = 16;  // draws whose words are made together
constexpr int64_t kDrawsPerTask = 8192;
constexpr int64_t kPadding = 8;  // a row of the table is a multiple of it, and ends with what no draw reaches

struct DrawArgs {
  const int32_t* order;  // class k owns order[start[k]] .. order[start[k + 1] - 1]
  const int32_t* start;
  const int64_t* cumulative;  // [C, row_length]
  const int64_t* seed;
  int64_t num_classes, row_length, draws_per_class, begin, end;
  int64_t* index;
};

struct Draw {
  template <int kBytes>
  PRCL_INLINE static void run(const DrawArgs& args) {
    philox::Words words[kBlock];
    const int64_t* row = args.cumulative + args.begin / args.draws_per_class * args.row_length;
    int64_t row_end = (args.begin / args.draws_per_class + 1) * args.draws_per_class;
    for (int64_t first = args.begin; first < args.end; first += kBlock) {
      for (int i = 0; i < kBlock; ++i) {
        words[i] = philox::draw(args.seed, uint32_t(first + i), philox::kNegatives);
      }
      const int64_t last = std::min(first + kBlock, args.end);
      for (int64_t element = first; element < last; ++element) {
        if (element == row_end) {
          row += args.row_length;
          row_end += args.draws_per_class;
        }
        const philox::Words& w = words[element - first];
        const int64_t total = row[args.num_classes - 1];
        const int64_t x = philox::bounded(w.w0, w.w1, total);
        int64_t k = 0;
        for (int64_t c = 0; c < args.row_length; ++c) k += row[c] <= x;
        if (total == 0) {
          args.index[element] = -1;
          continue;
        }
        const int64_t count = args.start[k + 1] - args.start[k];
        args.index[element] = args.order[args.start[k] + philox::bounded(w.w2, w.w3, count)];
      }
    }
  }
};

std::vector<int64_t> cumulative_weights(const double* probability, const int32_t* start, int64_t num_classes,
                                        int64_t row_length) {
  std::vector<int64_t> cumulative(num_classes * row_length, std::numeric_limits<int64_t>::max());
  for (int64_t c = 0; c < num_classes; ++c) {
    int64_t sum = 0;
    for (int64_t k = 0; k < num_classes; ++k) {
      if (k != c && start[k + 1] > start[k]) sum += philox::weight(probability[c * num_classes + k]);
      cumulative[c * row_length + k] = std::min(sum, philox::kOne);
    }
  }
  return cumulative;
}

Tensor sample_negatives(Tensor class_probability, Tensor order, Tensor start, int64_t num_anchors,
                        int64_t num_negatives, Tensor seed) {
  const int64_t num_classes = class_probability.size(0), draws_per_class = num_anchors * num_negatives;
  Tensor index = empty_like_of(seed, {num_classes, num_anchors, num_negatives});
  const int32_t* starts = start.const_data_ptr<int32_t>();
  const int64_t row_length = ceil_div(num_classes, kPadding) * kPadding;
  const std::vector<int64_t> cumulative =
      cumulative_weights(class_probability.const_data_ptr<double>(), starts, num_classes, row_length);
  const int64_t draws = num_classes * draws_per_class, tasks = ceil_div(draws, kDrawsPerTask);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    dispatch<Draw>(DrawArgs{order.const_data_ptr<int32_t>(), starts, cumulative.data(),
                            seed.const_data_ptr<int64_t>(), num_classes, row_length, draws_per_class,
                            begin * kDrawsPerTask, std::min(end * kDrawsPerTask, draws),
                            index.mutable_data_ptr<int64_t>()});
  });
  return index;
}

}  // namespace
}  // namespace prcl::cpu

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CPU, m) {
  m.impl("sample_negatives", TORCH_BOX(&prcl::cpu::sample_negatives));
}
