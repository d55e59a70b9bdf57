// Bilinear upsampling of logits a strip at a time, shared by pseudo_label and upsample_cross_entropy.
//
// A map of logits [C, h, w] is resized to [H, W] without storing the result. An input row is converted and
// interpolated horizontally once, into tiles [C, lanes] of one vector of output pixels each, in units of
// log 2, so that exp(l) is 2^l. Between input rows y and y + 1 lie the output rows of interval y; each of
// their values is one multiplication and one FMA on two tiles that are in L1. Threads own strips of intervals
// whose boundaries depend on the shape alone.
//
// Horizontally, the outputs of a tile lie between few neighbouring inputs: one load and two permutations
// serve a vector. Where they spread over more inputs than a vector holds, the tile is done in several
// pieces. The adjoint gathers: input j of a piece takes a run of consecutive outputs, one permutation and
// one FMA for each, in ascending order.
#pragma once

#include "cpu/buffer.h"
#include "cpu/convert.h"
#include "cpu/vector_math.h"
#include "shared/constants.h"
#include "shared/interpolation.h"
#include "shared/tensor.h"

#include <algorithm>
#include <vector>

namespace prcl::cpu {

// Copies `count` of kLanes values, in one piece where it is all of them.
template <int64_t kLanes, class T>
PRCL_INLINE void copy_lanes(const T* from, int64_t count, T* to) {
  if (count == kLanes) {
    std::memcpy(to, from, kLanes * sizeof(T));
  } else {
    std::copy_n(from, count, to);
  }
}

// Neighbours of output i; the fraction is zero at the last input, which has no neighbour.
inline Tap<double> tap_of(const Axis<double>& axis, int64_t i) {
  Tap<double> tap = axis.tap(i);
  if (tap.high == tap.low) tap.fraction = 0;
  return tap;
}

// The vertical axis.
template <class T>
struct Intervals {
  std::vector<int64_t> begin;  // [h + 1]: outputs begin[y] .. begin[y + 1] - 1 lie between inputs y and y + 1
  std::vector<T> fraction;     // [H], of the way to y + 1

  explicit Intervals(const Axis<double>& axis) : begin(axis.input + 1), fraction(axis.output) {
    for (int64_t i = 0; i < axis.output; ++i) {
      const Tap<double> tap = tap_of(axis, i);
      ++begin[tap.low + 1];
      fraction[i] = T(tap.fraction);
    }
    for (int64_t y = 0; y < axis.input; ++y) begin[y + 1] += begin[y];
  }
};

// The horizontal axis, as pieces.
template <class T>
struct Columns {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // an element of Vector<T>::Bits

  struct Piece {
    int64_t tile;
    int64_t first;   // the input of lane 0
    int64_t terms;   // the longest run of outputs that one input takes
    int64_t weight;  // where `adjoint` of this piece begins
  };

  int64_t input, output, lanes, tiles;
  int64_t stride;  // of a padded input row
  std::vector<Piece> pieces;
  std::vector<Index> low;                  // [pieces, lanes]: input, from `first`; the other one is the next
  std::vector<Index> inside;               // [pieces, lanes]: -1 for the outputs of the piece, else 0
  std::vector<T> low_weight, high_weight;  // [pieces, lanes], in units of log 2
  std::vector<Index> run;                  // [pieces, lanes]: the first output that an input takes
  std::vector<T> adjoint;                  // per piece [terms, lanes]

  Columns(const Axis<double>& axis, int64_t vector_lanes)
      : input(axis.input),
        output(axis.output),
        lanes(vector_lanes),
        tiles(ceil_div(output, lanes)),
        stride(ceil_div(input + lanes, lanes) * lanes) {
    std::vector<Tap<double>> taps(lanes);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int64_t i = 0; i < lanes; ++i) taps[i] = tap_of(axis, std::min(tile * lanes + i, output - 1));
      for (int64_t begin = 0, end = 0; begin < lanes; begin = end) {
        while (end < lanes && taps[end].low + 1 < taps[begin].low + lanes) ++end;
        add_piece(tile, taps, begin, end);
      }
    }
  }

 private:
  // Outputs begin .. end - 1 of a tile. Those beyond the map are zero and give nothing back.
  void add_piece(int64_t tile, const std::vector<Tap<double>>& taps, int64_t begin, int64_t end) {
    const int64_t first = taps[begin].low, real_end = std::min(end, output - tile * lanes);
    for (int64_t i = 0; i < lanes; ++i) {
      const bool is_inside = i >= begin && i < end, is_real = is_inside && i < real_end;
      low.push_back(is_inside ? Index(taps[i].low - first) : 0);
      inside.push_back(is_inside ? -1 : 0);
      low_weight.push_back(is_real ? T((1 - taps[i].fraction) * kLog2E) : T(0));
      high_weight.push_back(is_real ? T(taps[i].fraction * kLog2E) : T(0));
    }
    std::vector<int64_t> run_begin(lanes, begin), run_end(lanes, begin);
    int64_t terms = 0;
    for (int64_t j = 0; j < lanes; ++j) {
      int64_t& from = run_begin[j];
      while (from < real_end && taps[from].low + 1 < first + j) ++from;
      int64_t& to = run_end[j] = from;
      while (to < real_end && taps[to].low <= first + j) ++to;
      run.push_back(Index(from));
      terms = std::max(terms, to - from);
    }
    pieces.push_back({tile, first, terms, int64_t(adjoint.size())});
    for (int64_t k = 0; k < terms; ++k) {
      for (int64_t j = 0; j < lanes; ++j) {
        const int64_t i = run_begin[j] + k;
        const bool takes = i < run_end[j], is_low = takes && taps[i].low == first + j;
        adjoint.push_back(!takes ? T(0) : is_low ? T(1 - taps[i].fraction) : T(taps[i].fraction));
      }
    }
  }
};

// A task's intervals: as many as give about kOutputRows rows.
struct Strips {
  static constexpr int64_t kOutputRows = 32;
  int64_t rows, intervals, per_image, count;

  Strips(int64_t batch, const Axis<double>& vertical)
      : rows(vertical.input),
        intervals(ceil_div(kOutputRows * rows, vertical.output)),
        per_image(ceil_div(rows, intervals)),
        count(batch * per_image) {}

  int64_t image(int64_t strip) const { return strip / per_image; }
  int64_t begin(int64_t strip) const { return strip % per_image * intervals; }
  int64_t end(int64_t strip) const { return std::min(begin(strip) + intervals, rows); }
};

// One image of logits and how it is resized.
template <class S>
struct Upsampling {
  using T = Work<S>;
  const Columns<T>& columns;
  const Intervals<T>& intervals;
  const S* logits;  // [C, h, w]
  int64_t num_classes, stride_c, stride_y, stride_x;

  int64_t rows() const { return int64_t(intervals.begin.size()) - 1; }
  int64_t tile_size() const { return num_classes * columns.lanes; }
  int64_t row_size() const { return columns.tiles * tile_size(); }
  int64_t padded_row_size() const { return num_classes * columns.stride; }
};

// Input row y -> tiles [tiles, C, lanes]. `line` is scratch [w], `padded` [C, stride].
template <int kBytes, class S, class T = Work<S>>
PRCL_INLINE void interpolate_row(const Upsampling<S>& up, int64_t y, S* line, T* padded, T* to) {
  using Traits = Vector<T, kBytes>;
  using V = typename Traits::Type;
  using Bits = typename Traits::Bits;
  constexpr int64_t kLanes = Traits::kLanes;
  const Columns<T>& columns = up.columns;
  for (int64_t c = 0; c < up.num_classes; ++c) {
    const S* from = up.logits + c * up.stride_c + y * up.stride_y;
    if (up.stride_x != 1) {
      for (int64_t x = 0; x < columns.input; ++x) line[x] = from[x * up.stride_x];
      from = line;
    }
    convert_row<V>(from, columns.input, T(0), columns.stride, padded + c * columns.stride);
  }
  for (size_t p = 0; p < columns.pieces.size(); ++p) {
    const auto& piece = columns.pieces[p];
    const Bits low = load<Bits>(&columns.low[p * kLanes]), high = low + 1;
    const Bits inside = load<Bits>(&columns.inside[p * kLanes]);
    const V low_weight = load<V>(&columns.low_weight[p * kLanes]);
    const V high_weight = load<V>(&columns.high_weight[p * kLanes]);
    const T* from = padded + piece.first;
    T* tile = to + piece.tile * up.tile_size();
    for (int64_t c = 0; c < up.num_classes; ++c, from += columns.stride, tile += kLanes) {
      const V input = load<V>(from);
      const V value = permute(input, low) * low_weight + permute(input, high) * high_weight;
      store(tile, inside ? value : load<V>(tile));
    }
  }
}

// One piece of the adjoint for kClasses classes: tile [kClasses, lanes], added to [kClasses, stride].
template <int kBytes, int kClasses, class T>
PRCL_INLINE void adjoint_of_piece(const Columns<T>& columns, size_t p, const T* tile, T* to) {
  using V = typename Vector<T, kBytes>::Type;
  using Bits = typename Vector<T, kBytes>::Bits;
  constexpr int64_t kLanes = Vector<T, kBytes>::kLanes;
  const T* weight = &columns.adjoint[columns.pieces[p].weight];
  Bits output = load<Bits>(&columns.run[p * kLanes]);
  V grad[kClasses], sum[kClasses];
  for (int i = 0; i < kClasses; ++i) {
    grad[i] = load<V>(tile + i * kLanes);
    sum[i] = load<V>(to + i * columns.stride);
  }
  for (int64_t k = 0; k < columns.pieces[p].terms; ++k, weight += kLanes) {
    for (int i = 0; i < kClasses; ++i) sum[i] += permute(grad[i], output) * load<V>(weight);
    output += 1;
  }
  for (int i = 0; i < kClasses; ++i) store(to + i * columns.stride, sum[i]);
}

// The adjoint of interpolate_row but for its units: tiles [tiles, C, lanes], added to row y of `grad`
// [C, h, w]. `padded` is scratch [C, stride].
template <int kBytes, class T>
PRCL_INLINE void add_adjoint_of_row(const Columns<T>& columns, int64_t num_classes, const T* tiles, T* padded,
                                    T* grad, int64_t stride_c) {
  constexpr int64_t kLanes = Vector<T, kBytes>::kLanes;
  constexpr int kClasses = 4;  // whose sums run side by side
  std::fill_n(padded, num_classes * columns.stride, T(0));
  for (size_t p = 0; p < columns.pieces.size(); ++p) {
    const T* tile = tiles + columns.pieces[p].tile * num_classes * kLanes;
    T* to = padded + columns.pieces[p].first;
    int64_t c = 0;
    for (; c + kClasses <= num_classes; c += kClasses) {
      adjoint_of_piece<kBytes, kClasses>(columns, p, tile + c * kLanes, to + c * columns.stride);
    }
    for (; c < num_classes; ++c) {
      adjoint_of_piece<kBytes, 1>(columns, p, tile + c * kLanes, to + c * columns.stride);
    }
  }
  for (int64_t c = 0; c < num_classes; ++c) {
    const T* from = padded + c * columns.stride;
    T* to = grad + c * stride_c;
    for (int64_t x = 0; x < columns.input; ++x) to[x] += from[x];
  }
}

// The two interpolated input rows that the current interval needs; each row is made once.
template <class S>
class RowPair {
  using T = Work<S>;

 public:
  explicit RowPair(const Upsampling<S>& up)
      : line_(up.columns.input), padded_(up.padded_row_size()), tiles_(2 * up.row_size()) {}

  template <int kBytes>
  PRCL_INLINE const T* get(const Upsampling<S>& up, int64_t y) {
    T* const to = tiles_.data() + y % 2 * up.row_size();
    if (held_[y % 2] != y) interpolate_row<kBytes>(up, y, line_.data(), padded_.data(), to);
    held_[y % 2] = y;
    return to;
  }

 private:
  Buffer<S> line_;
  Buffer<T> padded_, tiles_;
  int64_t held_[2] = {-1, -1};
};

}  // namespace prcl::cpu
