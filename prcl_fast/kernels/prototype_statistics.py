"""Prototype statistics in Triton.

A program owns 1024 neighbouring pixels of one image, 64 dimensions and 32 classes. It reads its part of the
features once, 32 pixels at a time (pixels that do not count are not read), and adds the product of the
one-hot matrix [classes, pixels] with 1 / s and mu / s [pixels, dimensions] to sums in registers: float32
multiply-adds, exact on the one-hot side, pixels ascending. Both memory formats differ in strides only.

Each program writes its sums into a table [programs, C, 2 D] of its own; the tables are added in float64, in a
fixed order, without atomics. A quotient is right to 2 units in the last place. Where the norms of the means
are asked for, each program also writes the sums of squares of its part, which are added in the same manner.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.launch import device_of, grid_of
from prcl_fast.reference.norm import MIN_NORM

_SPAN = 1024
_PIXELS = 32
_CLASSES = 32


@triton.jit
def _sum_kernel(
    mu, var, label, valid, sums, counts, squares, area, dims, num_classes, spans, pixel_stride, dim_stride,
    NORMS: tl.constexpr, SPAN: tl.constexpr, PIXELS: tl.constexpr, DIMS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0)
    image = (span // spans).to(tl.int64)
    first = (span % spans) * SPAN
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    owner = tl.program_id(2) * CLASSES + tl.arange(0, CLASSES)
    mu += image * area * dims
    var += image * area * dims
    label += image * area
    valid += image * area
    precision = tl.zeros((CLASSES, DIMS), tl.float32)
    weighted_mean = tl.zeros((CLASSES, DIMS), tl.float32)
    count = tl.zeros((CLASSES,), tl.int32)
    for begin in range(first, tl.minimum(first + SPAN, area), PIXELS):
        pixel = begin + tl.arange(0, PIXELS)
        kept = tl.load(valid + pixel, mask=pixel < area, other=0) != 0
        value = tl.load(label + pixel, mask=kept, other=0).to(tl.int64)
        kept = kept & (value >= 0) & (value < num_classes)
        member = kept[None, :] & (value[None, :] == owner[:, None])
        place = pixel.to(tl.int64)[:, None] * pixel_stride + dim.to(tl.int64)[None, :] * dim_stride
        read = kept[:, None] & (dim < dims)[None, :]
        r = 1.0 / tl.load(var + place, mask=read, other=1.0).to(tl.float32)
        m = tl.load(mu + place, mask=read, other=0.0).to(tl.float32)
        t = m * r
        one_hot = member.to(tl.float32)
        precision = tl.dot(one_hot, r, precision, input_precision="ieee")
        weighted_mean = tl.dot(one_hot, t, weighted_mean, input_precision="ieee")
        count += tl.sum(member.to(tl.int32), 1)
        if NORMS:
            at = (tl.program_id(1) * (tl.num_programs(0) // spans) + image) * area + pixel
            once = (pixel < area) & (tl.program_id(2) == 0)
            tl.store(squares + at, tl.where(kept, tl.sum(m * m, 1), -1.0), mask=once)
    row = span.to(tl.int64) * num_classes + owner
    at = sums + row[:, None] * 2 * dims + dim[None, :]
    inside = (owner < num_classes)[:, None] & (dim < dims)[None, :]
    tl.store(at, precision, mask=inside)
    tl.store(at + dims, weighted_mean, mask=inside)
    tl.store(counts + row, count, mask=(owner < num_classes) & (tl.program_id(1) == 0))


def prototype_statistics(
    mu: Tensor, var: Tensor, label: Tensor, valid: Tensor, num_classes: int, with_norms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Precision and weighted mean [C, D] float32, count [C] int64, inverse norm [B, h, w] float32 or [0].

    mu and var are [B, D, h, w], both contiguous or both channels_last.
    """
    batch, dims, height, width = mu.shape
    area = height * width
    spans = triton.cdiv(area, _SPAN)
    sums = torch.empty(batch * spans, num_classes, 2, dims, dtype=torch.float32, device=mu.device)
    counts = torch.empty(batch * spans, num_classes, dtype=torch.int32, device=mu.device)
    strides = (1, area) if mu.is_contiguous() and var.is_contiguous() else (dims, 1)
    dims_block = min(64, max(16, triton.next_power_of_2(dims)))
    grid = grid_of(batch * spans, triton.cdiv(dims, dims_block), triton.cdiv(num_classes, _CLASSES))
    shape = (grid[1], batch, height, width) if with_norms else (0,)
    squares = torch.empty(shape, dtype=torch.float32, device=mu.device)
    with device_of(mu):
        _sum_kernel[grid](
            mu, var, label, valid.view(torch.uint8), sums, counts, squares, area, dims, num_classes, spans,
            *strides, NORMS=with_norms, SPAN=_SPAN, PIXELS=_PIXELS, DIMS=dims_block, CLASSES=_CLASSES,
        )  # fmt: skip
    precision, weighted_mean = sums.sum(0, dtype=torch.float64).float().unbind(1)
    if with_norms:
        # A negative sum is a pixel that does not count.
        square = squares.sum(0)
        inverse_norm = square.sqrt().clamp(min=MIN_NORM).reciprocal()
        squares = torch.where(square < 0, 0.0, inverse_norm)
    return precision.contiguous(), weighted_mean.contiguous(), counts.sum(0), squares
