"""Bilinear upsampling of a feature map, and its adjoint in gather form.

A program owns a tile of columns and channels of the result and walks down a strip of its rows. Forward, it
keeps the two input rows around it, interpolated to its columns. Backward, input row y and the next one form
an interval: the program sums the gradients of each output row between them over the output columns that read
its columns, and adds that, weighted, to the sums of both input rows; the sum of the lower one waits for the
next interval. The interval above the first row is worked out for that row as well. So each input value is
written once, by its owner, after sums in a fixed order: output columns ascending, then output rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.interpolation import axis_scale, first_output, taps
from prcl_fast.kernels.launch import INTERPRETED, device_of, grid_of

_ROWS = 8
# Columns and channels of a tile: in channels_last, of a contiguous map.
_TILE, _PLANE_TILE = ((64, 128), (64, 128)) if INTERPRETED else ((8, 128), (64, 4))


@triton.jit
def _between(row, left, right, fraction, mask):
    low = tl.load(row + left, mask=mask, other=0.0).to(tl.float32)
    return low + fraction * (tl.load(row + right, mask=mask, other=0.0).to(tl.float32) - low)


@triton.jit
def _upsample_kernel(
    x, out, channels, height, width, height_out, width_out, groups, tiles, scale_y, scale_x,
    stride_b, stride_c, stride_y, stride_x, out_stride_b, out_stride_c, out_stride_y, out_stride_x,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) % groups * CHANNELS + tl.arange(0, CHANNELS)
    column = tl.program_id(0) // groups % tiles * COLUMNS + tl.arange(0, COLUMNS)
    image = (tl.program_id(0) // groups // tiles).to(tl.int64)
    first = tl.program_id(1) * ROWS
    inside = (column < width_out)[:, None] & (c < channels)[None, :]
    low_x, high_x, fraction_x = taps(column, width, scale_x)
    plane = x + image * stride_b
    of_channel = c.to(tl.int64)[None, :] * stride_c
    left = of_channel + low_x.to(tl.int64)[:, None] * stride_x
    right = of_channel + high_x.to(tl.int64)[:, None] * stride_x
    to = c.to(tl.int64)[None, :] * out_stride_c + column.to(tl.int64)[:, None] * out_stride_x
    top = tl.full((COLUMNS, CHANNELS), 0.0, tl.float32)
    bottom = top
    held = -1
    out_row = out + image * out_stride_b + first.to(tl.int64) * out_stride_y + to
    for step in range(0, tl.minimum(height_out - first, ROWS)):
        low, high, fraction = taps(first + step, height, scale_y)
        if low != held:
            top = _between(plane + low.to(tl.int64) * stride_y, left, right, fraction_x[:, None], inside)
            bottom = _between(plane + high.to(tl.int64) * stride_y, left, right, fraction_x[:, None], inside)
            held = low
        value = top + fraction * (bottom - top)
        tl.store(out_row, value, mask=inside)
        out_row += out_stride_y


@triton.jit
def _gather_kernel(
    grad, out, channels, height, width, height_out, width_out, groups, tiles,
    steps_y, steps_x, scale_y, scale_x,
    stride_b, stride_c, stride_y, stride_x, out_stride_b, out_stride_c, out_stride_y, out_stride_x,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) % groups * CHANNELS + tl.arange(0, CHANNELS)
    column = tl.program_id(0) // groups % tiles * COLUMNS + tl.arange(0, COLUMNS)
    image = (tl.program_id(0) // groups // tiles).to(tl.int64)
    first = tl.program_id(1) * ROWS
    owned = column < width
    real = (c < channels)[None, :]
    begin_x = first_output(column - 1, width, width_out, steps_x, scale_x)
    end_x = tl.where(owned, first_output(column + 1, width, width_out, steps_x, scale_x), 0)
    most = tl.max(end_x - begin_x, 0)
    to = c.to(tl.int64)[None, :] * out_stride_c + column.to(tl.int64)[:, None] * out_stride_x
    upper = tl.full((COLUMNS, CHANNELS), 0.0, tl.float32)
    halo = tl.maximum(first - 1, 0)
    begin_y = first_output(halo, height, height_out, steps_y, scale_y)
    from_row = grad + image * stride_b + begin_y.to(tl.int64) * stride_y + c.to(tl.int64)[None, :] * stride_c
    out_row = out + image * out_stride_b + halo.to(tl.int64) * out_stride_y + to
    for step in range(0, tl.minimum(first + ROWS, height) - halo):
        row = halo + step
        lower = tl.full((COLUMNS, CHANNELS), 0.0, tl.float32)
        end_y = first_output(row + 1, height, height_out, steps_y, scale_y)
        for past in range(0, end_y - begin_y):
            # The last row is its own lower neighbour.
            depth = tl.where(row == height - 1, 0.0, (begin_y + past) * scale_y - row)
            total = tl.full((COLUMNS, CHANNELS), 0.0, tl.float32)
            for offset in range(0, most):
                x = begin_x + offset
                distance = tl.abs(tl.minimum(x * scale_x, width - 1.0) - column)
                weight = tl.maximum(1.0 - distance, 0.0)
                mask = (x < end_x)[:, None] & real
                value = tl.load(from_row + x.to(tl.int64)[:, None] * stride_x, mask=mask, other=0.0)
                total += weight[:, None] * value.to(tl.float32)
            upper += (1.0 - depth) * total
            lower += depth * total
            from_row += stride_y
        mask = owned[:, None] & real & (row >= first)
        tl.store(out_row, upper, mask=mask)
        out_row += out_stride_y
        upper = lower
        begin_y = end_y


def upsample_bilinear(x: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    """[B, C, h, w] -> [B, C, height, width]."""
    out = _map_like(x, height, width, channels_last)
    scale_y, scale_x = _scales(x, out)
    grid, tile = _tiles(out, channels_last)
    with device_of(x):
        _upsample_kernel[grid](
            x, out, *x.shape[1:], height, width, *tile[:2], scale_y, scale_x, *x.stride(), *out.stride(),
            ROWS=_ROWS, COLUMNS=tile[2], CHANNELS=tile[3],
        )  # fmt: skip
    return out


def upsample_bilinear_backward(grad: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    """[B, C, H, W] -> [B, C, height, width], the adjoint."""
    out = _map_like(grad, height, width, channels_last)
    scale_y, scale_x = _scales(out, grad)
    grid, tile = _tiles(out, channels_last)
    steps = (size.bit_length() for size in grad.shape[2:])
    with device_of(grad):
        _gather_kernel[grid](
            grad, out, *out.shape[1:], *grad.shape[2:], *tile[:2], *steps, scale_y, scale_x,
            *grad.stride(), *out.stride(),
            ROWS=_ROWS, COLUMNS=tile[2], CHANNELS=tile[3],
        )  # fmt: skip
    return out


def _map_like(like: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    size = (*like.shape[:2], height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _scales(small: Tensor, large: Tensor) -> tuple[float, float]:
    scale_y, scale_x = (
        axis_scale(size_in, size_out)
        for size_in, size_out in zip(small.shape[2:], large.shape[2:], strict=True)
    )
    return scale_y, scale_x


def _tiles(out: Tensor, channels_last: bool) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
    """The grid, and of an image: groups of channels, tiles of columns, columns and channels of a tile."""
    batch, channels, height, width = out.shape
    most_columns, most_channels = _TILE if channels_last else _PLANE_TILE
    of_tile = min(most_channels, triton.next_power_of_2(channels))
    groups, tiles = triton.cdiv(channels, of_tile), triton.cdiv(width, most_columns)
    return grid_of(batch * groups * tiles, triton.cdiv(height, _ROWS)), (groups, tiles, most_columns, of_tile)
