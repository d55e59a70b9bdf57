// Bilinear upsampling of feature maps on the CPU, and its adjoint.
//
// A map is a list of planes, each of rows of columns of `inner` values that lie side by side: in
// channels_last a plane is an image and a column holds its channels, otherwise a plane is one channel and
// `inner` is 1.
//
// Forward: a task owns output rows. It blends the two input rows around an output row once, over all their
// columns, and interpolates the output row between columns of the blend, which are in L1 or L2.
//
// Backward: a task owns input rows. Between input rows y and y + 1 lie the output rows of interval y. A tile
// of their columns is summed over these rows, once weighted for y and once for y + 1; then each column of the
// two sums goes to the input columns on both its sides, so that a gradient is read once. The interval above a
// task's first row is summed by the task above as well, each for its own row. An input's sum takes the
// interval above its row before the one below, columns in ascending order, whatever the tasks are.

#include "cpu/upsampling.h"

#include <torch/csrc/stable/library.h>

// Of lambdas, so that they are compiled for the instructions of the function around them.
#define PRCL_INLINED __attribute__((always_inline))

namespace prcl::cpu {
namespace {

constexpr int64_t kValuesPerTask = 1 << 15;  // at least, of the larger map
constexpr int64_t kTileValues = 1024;        // of each of the two sums of a tile: both stay in L1

template <class S>
struct Planes {
  S* data;
  int64_t inner, per_image, of_image, of_plane, of_row, of_column;

  Planes(const Tensor& map, S* values, bool channels_last)
      : data(values),
        inner(channels_last ? map.size(1) : 1),
        per_image(channels_last ? 1 : map.size(1)),
        of_image(map.stride(0)),
        of_plane(map.stride(1)),
        of_row(map.stride(2)),
        of_column(channels_last ? map.stride(3) : 1) {}

  PRCL_INLINE S* row(int64_t plane, int64_t y) const {
    return data + plane / per_image * of_image + plane % per_image * of_plane + y * of_row;
  }

  // Calls f(where in a row, where in a buffer, count) for `columns` columns from `first` on: all at once
  // where they lie side by side.
  template <class F>
  PRCL_INLINE void for_runs(int64_t first, int64_t columns, const F& f) const {
    if (of_column == inner) return f(first * inner, int64_t(0), columns * inner);
    for (int64_t x = 0; x < columns; ++x) f((first + x) * of_column, x * inner, inner);
  }
};

// Calls f(V{}, i) for whole vectors of 0 .. count - 1, then f(T{}, i) for the values that are left.
template <class V, class T, class F>
PRCL_INLINE void for_vectors(int64_t count, const F& f) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(T);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(V{}, i);
  for (; i < count; ++i) f(T{}, i);
}

// One value or a vector of them, as the first argument of f above says.
template <class V, class S>
PRCL_INLINE V read(const S* from) {
  if constexpr (std::is_floating_point_v<V>) {
    return V(*from);
  } else {
    return load_as<V>(from);
  }
}

template <class V, class S>
PRCL_INLINE void write(S* to, const V& value) {
  if constexpr (std::is_floating_point_v<V>) {
    *to = S(value);
  } else {
    store_as(to, value);
  }
}

template <class T>
std::vector<Tap<T>> taps_of(const Axis<double>& axis) {
  std::vector<Tap<T>> taps;
  for (int64_t i = 0; i < axis.output; ++i) {
    const Tap<double> tap = tap_of(axis, i);
    taps.push_back({tap.low, tap.high, T(tap.fraction)});
  }
  return taps;
}

template <class S>
struct ForwardArgs {
  using T = Work<S>;
  Planes<const S> from;
  Planes<S> to;
  const std::vector<Tap<T>>&rows, &columns;
  int64_t width;       // of the input
  int64_t begin, end;  // rows of all output planes
};

template <class S>
struct Forward {
  using T = Work<S>;

  template <int kBytes>
  PRCL_INLINE static void run(const ForwardArgs<S>& args) {
    using V = typename Vector<T, kBytes>::Type;
    const int64_t inner = args.from.inner, height = int64_t(args.rows.size());
    const int64_t width = int64_t(args.columns.size());
    const Buffer<T> blend(args.width * inner);
    for (int64_t i = args.begin; i < args.end; ++i) {
      const Tap<T>& down = args.rows[i % height];
      const S* top = args.from.row(i / height, down.low);
      const S* bottom = args.from.row(i / height, down.high);
      args.from.for_runs(0, args.width, [&](int64_t at, int64_t to, int64_t count) PRCL_INLINED {
        for_vectors<V, T>(count, [&](auto kind, int64_t k) PRCL_INLINED {
          using W = decltype(kind);
          const W upper = read<W>(top + at + k), lower = read<W>(bottom + at + k);
          write(blend.data() + to + k, upper + down.fraction * (lower - upper));
        });
      });
      S* row = args.to.row(i / height, i % height);
      if (inner == 1) {
        for (int64_t x = 0; x < width; ++x) {
          const Tap<T>& across = args.columns[x];
          const T left = blend.data()[across.low], right = blend.data()[across.high];
          row[x] = S(left + across.fraction * (right - left));
        }
        continue;
      }
      for (int64_t x = 0; x < width; ++x, row += args.to.of_column) {
        const Tap<T>& across = args.columns[x];
        const T *left = blend.data() + across.low * inner, *right = blend.data() + across.high * inner;
        for_vectors<V, T>(inner, [&](auto kind, int64_t k) PRCL_INLINED {
          using W = decltype(kind);
          const W from = read<W>(left + k);
          write(row + k, from + across.fraction * (read<W>(right + k) - from));
        });
      }
    }
  }
};

template <class S>
struct BackwardArgs {
  using T = Work<S>;
  Planes<const S> grad;
  Planes<S> to;
  const Intervals<T>& rows;
  const std::vector<Tap<T>>& columns;
  int64_t width;       // of the input
  int64_t begin, end;  // rows of all input planes
};

template <class S>
struct Backward {
  using T = Work<S>;

  template <int kBytes>
  PRCL_INLINE static void run(const BackwardArgs<S>& args) {
    using V = typename Vector<T, kBytes>::Type;
    const int64_t inner = args.grad.inner, height = int64_t(args.rows.begin.size()) - 1;
    const int64_t row_size = args.width * inner;
    const Buffer<T> sums(2 * row_size), tile(2 * tile_columns(inner) * inner);
    T *upper = sums.data(), *lower = sums.data() + row_size;
    for (int64_t i = args.begin; i < args.end;) {
      const int64_t plane = i / height, first = i % height;
      const int64_t last = std::min(height, first + args.end - i);
      std::fill_n(upper, row_size, T(0));
      for (int64_t y = std::max<int64_t>(first - 1, 0); y < last; ++y) {
        std::fill_n(lower, row_size, T(0));
        add_interval<V>(args, plane, y, tile.data(), upper, lower);
        if (y >= first) {
          S* row = args.to.row(plane, y);
          for_vectors<V, T>(row_size, [&](auto kind, int64_t k)
                                          PRCL_INLINED { write(row + k, read<decltype(kind)>(upper + k)); });
        }
        std::swap(upper, lower);
      }
      i += last - first;
    }
  }

 private:
  static int64_t tile_columns(int64_t inner) { return std::max<int64_t>(kTileValues / inner, 1); }

  // Adds what the output rows of interval y give to input rows y and y + 1.
  template <class V>
  PRCL_INLINE static void add_interval(const BackwardArgs<S>& args, int64_t plane, int64_t y, T* tile,
                                       T* upper, T* lower) {
    const int64_t begin = args.rows.begin[y], end = args.rows.begin[y + 1];
    if (begin == end) return;
    const int64_t inner = args.grad.inner, width = int64_t(args.columns.size());
    const int64_t most = tile_columns(inner);
    const S* grad = args.grad.row(plane, begin);
    T* const tile_lower = tile + most * inner;
    for (int64_t x = 0; x < width; x += most) {
      const int64_t columns = std::min(most, width - x);
      args.grad.for_runs(x, columns, [&](int64_t at, int64_t to, int64_t count) PRCL_INLINED {
        for_vectors<V, T>(count, [&](auto kind, int64_t k) PRCL_INLINED {
          using W = decltype(kind);
          W to_upper{}, to_lower{};
          const S* from = grad + at + k;
          for (int64_t row = begin; row < end; ++row, from += args.grad.of_row) {
            const W g = read<W>(from);
            const T fraction = args.rows.fraction[row];
            to_upper += g * (T(1) - fraction);
            to_lower += g * fraction;
          }
          write(tile + to + k, to_upper);
          write(tile_lower + to + k, to_lower);
        });
      });
      for (int64_t column = 0; column < columns; ++column) {
        const Tap<T>& across = args.columns[x + column];
        add_column<V>(across, inner, tile + column * inner, upper);
        add_column<V>(across, inner, tile_lower + column * inner, lower);
      }
    }
  }

  template <class V>
  PRCL_INLINE static void add_column(const Tap<T>& across, int64_t inner, const T* sum, T* row) {
    T *left = row + across.low * inner, *right = row + across.high * inner;
    const T of_right = across.fraction, of_left = T(1) - of_right;
    for_vectors<V, T>(inner, [&](auto kind, int64_t k) PRCL_INLINED {
      using W = decltype(kind);
      const W g = read<W>(sum + k);
      write(left + k, read<W>(left + k) + g * of_left);
      if (left != right) write(right + k, read<W>(right + k) + g * of_right);
    });
  }
};

// Calls f(begin, end) for parts of the rows of all planes, in parallel.
template <class S, class F>
void for_rows(const Planes<S>& planes, int64_t images, int64_t rows, int64_t values_per_row, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(values_per_row, 1));
  torch::stable::parallel_for(0, images * planes.per_image * rows, grain, f);
}

Tensor upsample_bilinear(Tensor x, int64_t height, int64_t width, bool channels_last) {
  Tensor out = map_like(x, height, width, channels_last);
  const Axis<double> vertical(x.size(2), height);
  const Axis<double> horizontal(x.size(3), width);
  dispatch_floating(x, [&](auto zero) {
    using S = decltype(zero);
    using T = Work<S>;
    const auto rows = taps_of<T>(vertical), columns = taps_of<T>(horizontal);
    const Planes<const S> from(x, x.const_data_ptr<S>(), channels_last);
    const Planes<S> to(out, out.mutable_data_ptr<S>(), channels_last);
    for_rows(to, x.size(0), height, width * to.inner, [&](int64_t begin, int64_t end) {
      dispatch<Forward<S>>(ForwardArgs<S>{from, to, rows, columns, horizontal.input, begin, end});
    });
  });
  return out;
}

Tensor upsample_bilinear_backward(Tensor grad, int64_t height, int64_t width, bool channels_last) {
  Tensor out = map_like(grad, height, width, channels_last);
  const Axis<double> vertical(height, grad.size(2));
  const Axis<double> horizontal(width, grad.size(3));
  dispatch_floating(grad, [&](auto zero) {
    using S = decltype(zero);
    using T = Work<S>;
    const Intervals<T> rows(vertical);
    const auto columns = taps_of<T>(horizontal);
    const Planes<const S> from(grad, grad.const_data_ptr<S>(), channels_last);
    const Planes<S> to(out, out.mutable_data_ptr<S>(), channels_last);
    const int64_t values = grad.size(2) * grad.size(3) * to.inner / height;
    for_rows(to, grad.size(0), height, values, [&](int64_t begin, int64_t end) {
      dispatch<Backward<S>>(BackwardArgs<S>{from, to, rows, columns, width, begin, end});
    });
  });
  return out;
}

}  // namespace
}  // namespace prcl::cpu

STABLE_TORCH_LIBRARY_IMPL(prcl_fast_native, CPU, m) {
  m.impl("upsample_bilinear", TORCH_BOX(&prcl::cpu::upsample_bilinear));
  m.impl("upsample_bilinear_backward", TORCH_BOX(&prcl::cpu::upsample_bilinear_backward));
}
