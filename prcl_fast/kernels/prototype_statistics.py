"""Prototype statistics in Triton.

The pixels are sorted by class (class_lists), by the caller or here. A program owns up to 512 neighbours in
the list of one class and up to 1024 dimensions; which neighbours, it finds in the table of the lists' starts.
It reads their rows of the features once, 4096 values at a time, and adds 1 / s and mu / s to sums in
registers, one for each row of that tile. Pixels that do not count are never read. Features that are not
channels_last are copied.

Each program writes its sums into a row of a table [programs, 2, D]. A second kernel adds each class's rows
in float64. All sums have a fixed order, without atomics. A reciprocal is right to 1 unit in the last place.
Where the norms of the means are asked for, each program also writes the sum of squares of its part of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.class_lists import class_lists
from prcl_fast.kernels.launch import device_of, grid_of, reciprocal
from prcl_fast.reference.norm import MIN_NORM

_PIXELS = 512
_TILE = 4096
_MOST_DIMS = 1024
_MERGED_ROWS, _MERGED_DIMS = 32, 32


@triton.jit
def _sum_kernel(
    mu, var, order, start, sums, squares, pixels, dims, num_classes,
    NORMS: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    squares += tl.program_id(1).to(tl.int64) * pixels
    program = tl.program_id(0)
    begin, after, first = _programs(start, num_classes, PIXELS, CLASSES)
    mine = (first <= program) & (program < first + tl.cdiv(after - begin, PIXELS))
    position = tl.sum(tl.where(mine, begin + (program - first) * PIXELS, 0), 0)
    stop = tl.minimum(position + PIXELS, tl.sum(tl.where(mine, after, 0), 0))
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)[None, :]
    precision = tl.zeros((ROWS, DIMS), tl.float32)
    weighted_mean = tl.zeros((ROWS, DIMS), tl.float32)
    for i in range(position, stop, ROWS):
        listed = i + tl.arange(0, ROWS)
        kept = listed < stop
        pixel = tl.load(order + listed, mask=kept, other=0).to(tl.int64)
        place = (pixel * dims)[:, None] + dim
        read = kept[:, None] & (dim < dims)
        r = reciprocal(tl.load(var + place, mask=read, other=float("inf")).to(tl.float32))
        precision += r
        mean = tl.load(mu + place, mask=read, other=0.0).to(tl.float32)
        weighted_mean += mean * r
        if NORMS:
            tl.store(squares + pixel, tl.sum(mean * mean, 1), mask=kept)
    at = sums + program.to(tl.int64) * 2 * dims + dim
    tl.store(at, tl.sum(precision, 0)[None, :], mask=dim < dims)
    tl.store(at + dims, tl.sum(weighted_mean, 0)[None, :], mask=dim < dims)


@triton.jit
def _merge_kernel(
    sums, start, precision, weighted_mean, count, dims, num_classes,
    PIXELS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    begin, after, first = _programs(start, num_classes, PIXELS, CLASSES)
    mine = tl.arange(0, CLASSES) == c
    pixels = tl.sum(tl.where(mine, after - begin, 0), 0)
    program = tl.sum(tl.where(mine, first, 0), 0)
    stop = program + tl.cdiv(pixels, PIXELS)
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)[None, :]
    of_precision = tl.zeros((ROWS, DIMS), tl.float64)
    of_mean = tl.zeros((ROWS, DIMS), tl.float64)
    for i in range(program, stop, ROWS):
        row = i + tl.arange(0, ROWS)[:, None]
        read = (row < stop) & (dim < dims)
        place = row.to(tl.int64) * 2 * dims + dim
        of_precision += tl.load(sums + place, mask=read, other=0.0).to(tl.float64)
        of_mean += tl.load(sums + place + dims, mask=read, other=0.0).to(tl.float64)
    at = c * dims + dim
    tl.store(precision + at, tl.sum(of_precision, 0)[None, :].to(tl.float32), mask=dim < dims)
    tl.store(weighted_mean + at, tl.sum(of_mean, 0)[None, :].to(tl.float32), mask=dim < dims)
    tl.store(count + c, pixels.to(tl.int64), mask=tl.program_id(1) == 0)


@triton.jit
def _programs(start, num_classes, PIXELS: tl.constexpr, CLASSES: tl.constexpr):
    """Begin and end of each class in the list, and its first program."""
    c = tl.arange(0, CLASSES)
    begin = tl.load(start + c, mask=c < num_classes, other=0)
    after = tl.load(start + c + 1, mask=c < num_classes, other=0)
    programs = tl.cdiv(after - begin, PIXELS)
    return begin, after, tl.cumsum(programs, 0) - programs


def prototype_statistics(
    mu: Tensor,
    var: Tensor,
    label: Tensor,
    valid: Tensor,
    num_classes: int,
    with_norms: bool,
    order: Tensor | None,
    start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Precision and weighted mean [C, D] float32, count [C] int64, inverse norm [B, h, w] float32 or [0].

    mu and var are [B, D, h, w]; order and start are the class lists of the valid pixels, None where they are
    to be made.
    """
    mu, var = (x.contiguous(memory_format=torch.channels_last) for x in (mu, var))
    batch, dims, height, width = mu.shape
    pixels = batch * height * width
    if order is None or start is None:
        order, start, _, _ = class_lists(label, valid, valid, num_classes)
    programs = triton.cdiv(pixels, _PIXELS) + num_classes  # upper bound
    sums = torch.empty(programs, 2, dims, dtype=torch.float32, device=mu.device)
    precision = sums.new_empty(num_classes, dims)
    weighted_mean = torch.empty_like(precision)
    count = torch.empty(num_classes, dtype=torch.int64, device=mu.device)
    classes = triton.next_power_of_2(num_classes)
    dims_block = min(_MOST_DIMS, max(32, triton.next_power_of_2(dims)))
    grid = grid_of(programs, triton.cdiv(dims, dims_block))
    # -1 marks pixels that are not valid.
    squares = sums.new_full((grid[1], batch, height, width) if with_norms else (0,), -1.0)
    with device_of(mu):
        _sum_kernel[grid](
            mu, var, order, start, sums, squares, pixels, dims, num_classes, NORMS=with_norms,
            PIXELS=_PIXELS, ROWS=_TILE // dims_block, DIMS=dims_block, CLASSES=classes,
        )  # fmt: skip
        _merge_kernel[grid_of(num_classes, triton.cdiv(dims, _MERGED_DIMS))](
            sums, start, precision, weighted_mean, count, dims, num_classes,
            PIXELS=_PIXELS, ROWS=_MERGED_ROWS, DIMS=_MERGED_DIMS, CLASSES=classes,
        )  # fmt: skip
    if with_norms:
        square = squares.sum(0)
        squares = torch.where(square < 0, 0.0, square.sqrt().clamp(min=MIN_NORM).reciprocal())
    return precision, weighted_mean, count, squares
