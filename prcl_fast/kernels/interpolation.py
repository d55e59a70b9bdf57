"""Bilinear interpolation inside a kernel, as torch.nn.functional.interpolate does with aligned corners.

Output i lies at i * scale among the inputs of its axis.
"""

from __future__ import annotations

import triton
import triton.language as tl


def axis_scale(size_in: int, size_out: int) -> float:
    """Input positions per output position along one axis."""
    return (size_in - 1) / (size_out - 1) if size_out > 1 else 0.0


@triton.jit
def taps(i, size_in, scale):
    """Output i lies at `fraction` of the way from input `low` to `high`, which is low or low + 1 (int32)."""
    position = i * scale
    low = tl.minimum(position.to(tl.int32), size_in - 1)
    return low, tl.minimum(low + 1, size_in - 1), position - low.to(tl.float32)


@triton.jit
def first_output(low, size_in, size_out, steps, scale):
    """The first output whose lower neighbour is input `low` or a later one (int32), size_out for none.

    `steps` are those of a search in size_out outputs: `size_out.bit_length()`.
    """
    begin = low * 0
    end = begin + size_out
    for _ in range(steps):
        middle = (begin + end) // 2
        low_of_middle, _high, _fraction = taps(middle, size_in, scale)
        before = (low_of_middle < low) & (begin < end)
        begin = tl.where(before, middle + 1, begin)
        end = tl.where(before, end, middle)
    return begin


@triton.jit
def corners(pixel, height, width, width_out, scale_y, scale_x, stride_y, stride_x):
    """Offsets of the four neighbours of output `pixel` in an image, row by row, and the two fractions."""
    low_y, high_y, fraction_y = taps(pixel // width_out, height, scale_y)
    low_x, high_x, fraction_x = taps(pixel % width_out, width, scale_x)
    top, bottom = low_y.to(tl.int64) * stride_y, high_y.to(tl.int64) * stride_y
    left, right = low_x.to(tl.int64) * stride_x, high_x.to(tl.int64) * stride_x
    return top + left, top + right, bottom + left, bottom + right, fraction_y, fraction_x


@triton.jit
def bilinear(image, at_00, at_01, at_10, at_11, fraction_y, fraction_x):
    """The image between four neighbours."""
    top_left = tl.load(image + at_00).to(tl.float32)
    bottom_left = tl.load(image + at_10).to(tl.float32)
    top = top_left + fraction_x * (tl.load(image + at_01).to(tl.float32) - top_left)
    bottom = bottom_left + fraction_x * (tl.load(image + at_11).to(tl.float32) - bottom_left)
    return top + fraction_y * (bottom - top)
