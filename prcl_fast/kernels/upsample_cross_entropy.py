"""Cross-entropy of bilinearly upsampled logits in Triton.

Loss: a program owns 512 neighbouring pixels of one output image and walks over the classes, interpolating
each logit where it is needed. It keeps the running sum of exp(logit - largest) and the target's logit, and
writes the sum of its losses to a slot of its own; for the gradient it leaves log-sum-exp, [B, H, W].

Gradient: a program owns 8 neighbouring columns of 16 input rows of four classes and walks down those rows. A
row and the next one form a strip; each output pixel lies in one strip, between two columns. The program
interpolates the logits of every output pixel that touches its columns, makes their gradients from
log-sum-exp, and adds them to the strip's upper row and, weighted otherwise, to the lower row, which it keeps
for the next strip. So each input value is written once, by its owner, after sums in a fixed order, without
atomics; an output pixel is worked out twice, by the owners of both its columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.interpolation import axis_scale, bilinear, corners, taps
from prcl_fast.kernels.launch import INTERPRETED, device_of, grid_of

_BLOCK = 512
_CLASSES, _COLUMNS = (32, 32) if INTERPRETED else (4, 8)
_ROWS = 16
_AXIS_BLOCK = 64
_SPAN = 16  # output columns of one input column that are worked on at a time


@triton.jit
def _loss_kernel(
    logits, target, weight, losses, counts, log_sums, ignore_index, num_classes, height, width, area_out,
    width_out, scale_y, scale_x, stride_b, stride_c, stride_y, stride_x, weight_stride_b, weight_stride_pixel,
    NEEDS_GRAD: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < area_out
    at_00, at_01, at_10, at_11, fraction_y, fraction_x = corners(
        tl.where(inside, pixel, 0), height, width, width_out, scale_y, scale_x, stride_y, stride_x, ALIGN
    )
    wanted = tl.load(target + image * area_out + pixel, mask=inside, other=0).to(tl.int64)
    kept = inside & (wanted != ignore_index)
    plane = logits + image * stride_b
    largest = bilinear(plane, at_00, at_01, at_10, at_11, fraction_y, fraction_x)
    picked = largest
    total = tl.full((BLOCK,), 1.0, tl.float32)
    for c in range(1, num_classes):
        plane += stride_c
        logit = bilinear(plane, at_00, at_01, at_10, at_11, fraction_y, fraction_x)
        higher = logit > largest
        ratio = tl.exp(-tl.abs(logit - largest))
        total = tl.where(higher, total * ratio + 1.0, total + ratio)
        largest = tl.where(higher, logit, largest)
        picked = tl.where(wanted == c, logit, picked)
    factor = tl.load(weight + image * weight_stride_b + pixel * weight_stride_pixel, mask=kept, other=0.0)
    loss = (largest - picked + tl.log(total)) * factor
    slot = image * tl.num_programs(0) + tl.program_id(0)
    tl.store(losses + slot, tl.sum(tl.where(kept, loss, 0.0), 0))
    tl.store(counts + slot, tl.sum(kept.to(tl.int32), 0))
    if NEEDS_GRAD:
        tl.store(log_sums + image * area_out + pixel, largest + tl.log(total), mask=inside)


@triton.jit
def _axis_kernel(starts, lows, fractions, size_in, size_out, scale, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Tables of one axis: each output's lower neighbour and fraction, and where each input's outputs begin.

    starts[k], k = 0 .. size_in, is the first output whose lower neighbour is input k or a later one.
    """
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, _high, fraction = taps(k, size_in, scale, ALIGN)
    tl.store(lows + k, low, mask=k < size_out)
    tl.store(fractions + k, fraction, mask=k < size_out)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, size_out, BLOCK):
        i = first + tl.arange(0, BLOCK)
        low_i, _, _ = taps(i, size_in, scale, ALIGN)
        before += tl.sum(((low_i[None, :] < k[:, None]) & (i < size_out)[None, :]).to(tl.int32), 1)
    tl.store(starts + k, before, mask=k <= size_in)


@triton.jit
def _gradient_kernel(
    logits, target, weight, log_sums, scale, starts_y, fractions_y, starts_x, lows_x, fractions_x, grad,
    ignore_index, num_classes, groups, height, width, height_out, width_out, most_columns,
    stride_b, stride_c, stride_y, stride_x, weight_stride_b, weight_stride_pixel,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // groups).to(tl.int64)
    c = (tl.program_id(0) % groups) * CLASSES + tl.arange(0, CLASSES)
    first_row = tl.program_id(1) * ROWS
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    real = c < num_classes
    owned = column < width
    image_plane = logits + image * stride_b
    to_class = c.to(tl.int64)[:, None, None] * stride_c
    target += image * height_out * width_out
    log_sums += image * height_out * width_out
    weight += image * weight_stride_b
    mean_scale = tl.load(scale)
    # The output columns that touch a column: those between it and its neighbours on both sides.
    begin = tl.load(starts_x + tl.maximum(column - 1, 0), mask=owned, other=0)
    end = tl.load(starts_x + column + 1, mask=owned, other=0)
    carried = tl.full((CLASSES, COLUMNS), 0.0, tl.float32)
    halo = tl.maximum(first_row - 1, 0)
    top_row = image_plane + halo.to(tl.int64) * stride_y
    for row in range(halo, tl.minimum(first_row + ROWS, height)):
        last = row == height - 1
        bottom_row = top_row + tl.where(last, 0, stride_y)
        to_upper = tl.full((CLASSES, COLUMNS), 0.0, tl.float32)
        to_lower = tl.full((CLASSES, COLUMNS), 0.0, tl.float32)
        for offset in range(0, most_columns, SPAN):
            x = begin[:, None] + offset + tl.arange(0, SPAN)[None, :]  # [COLUMNS, SPAN]
            touches = x < end[:, None]
            low = tl.load(lows_x + x, mask=touches, other=0)
            high = tl.minimum(low + 1, width - 1)
            fraction = tl.load(fractions_x + x, mask=touches, other=0.0)
            share = tl.where(low == column[:, None], 1.0 - fraction, 0.0)
            share += tl.where(high == column[:, None], fraction, 0.0)
            left = to_class + (low.to(tl.int64) * stride_x)[None, :, :]
            right = to_class + (high.to(tl.int64) * stride_x)[None, :, :]
            read = real[:, None, None] & touches[None, :, :]
            across = fraction[None, :, :]
            top = tl.load(top_row + left, mask=read, other=0.0).to(tl.float32)
            top += across * (tl.load(top_row + right, mask=read, other=0.0).to(tl.float32) - top)
            bottom = tl.load(bottom_row + left, mask=read, other=0.0).to(tl.float32)
            bottom += across * (tl.load(bottom_row + right, mask=read, other=0.0).to(tl.float32) - bottom)
            difference = bottom - top
            upper = tl.full((CLASSES, COLUMNS, SPAN), 0.0, tl.float32)
            lower = tl.full((CLASSES, COLUMNS, SPAN), 0.0, tl.float32)
            for y in range(tl.load(starts_y + row), tl.load(starts_y + row + 1)):
                depth = tl.load(fractions_y + y)
                pixel = y * width_out + x
                wanted = tl.load(target + pixel, mask=touches, other=0).to(tl.int64)
                kept = touches & (wanted != ignore_index)
                # Infinite, it makes the probability 0 where nothing was read or counts.
                log_sum = tl.load(log_sums + pixel, mask=kept, other=float("inf"))
                factor = tl.load(weight + pixel * weight_stride_pixel, mask=kept, other=0.0)
                probability = tl.exp(top + depth * difference - log_sum[None, :, :])
                hit = wanted[None, :, :] == c[:, None, None]
                slope = (probability - hit.to(tl.float32)) * factor[None, :, :]
                upper += (1.0 - depth) * slope
                lower += depth * slope
            to_upper += tl.sum(upper * share[None, :, :], 2)
            to_lower += tl.sum(lower * share[None, :, :], 2)
        value = carried + tl.where(last, to_upper + to_lower, to_upper)  # below the last row lies itself
        carried = to_lower
        top_row = bottom_row
        at = ((image * num_classes + c[:, None]) * height + row) * width + column[None, :]
        tl.store(grad + at, value * mean_scale, mask=real[:, None] & owned[None, :] & (row >= first_row))


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    mean: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and its gradient [B, C, h, w], empty unless `needs_grad`; both float32."""
    batch, num_classes, height, width = logits.shape
    height_out, width_out = target.shape[1:]
    area_out = height_out * width_out
    device = logits.device
    scale_y = axis_scale(height, height_out, align_corners)
    scale_x = axis_scale(width, width_out, align_corners)
    if weight is None:
        weight = torch.ones(1, dtype=torch.float32, device=device)
        weight_strides = (0, 0)
    else:
        weight_strides = (1, 0) if weight.dim() == 1 else (area_out, 1)
    blocks = triton.cdiv(area_out, _BLOCK)
    losses = torch.empty(batch * blocks, dtype=torch.float32, device=device)
    counts = torch.empty(batch * blocks, dtype=torch.int32, device=device)
    log_sums = torch.empty(target.shape if needs_grad else (0,), dtype=torch.float32, device=device)
    grad = torch.empty(logits.shape if needs_grad else (0,), dtype=torch.float32, device=device)
    with device_of(logits):
        _loss_kernel[grid_of(blocks, batch)](
            logits, target, weight, losses, counts, log_sums, ignore_index, num_classes, height, width,
            area_out, width_out, scale_y, scale_x, *logits.stride(), *weight_strides,
            NEEDS_GRAD=needs_grad, ALIGN=align_corners, BLOCK=_BLOCK,
        )  # fmt: skip
        loss = losses.sum()
        scale = counts.sum().clamp(min=1).float().reciprocal() if mean else torch.ones_like(loss)
        if needs_grad:
            starts_y, _, fractions_y = _axis(height, height_out, scale_y, align_corners, device)
            axis_x = _axis(width, width_out, scale_x, align_corners, device)
            groups = triton.cdiv(num_classes, _CLASSES)
            grid = grid_of(batch * groups, triton.cdiv(height, _ROWS), triton.cdiv(width, _COLUMNS))
            _gradient_kernel[grid](
                logits, target, weight, log_sums, scale, starts_y, fractions_y, *axis_x, grad,
                ignore_index, num_classes, groups, height, width, height_out, width_out,
                _most_columns(width, width_out, scale_x), *logits.stride(), *weight_strides,
                CLASSES=_CLASSES, ROWS=_ROWS, COLUMNS=_COLUMNS, SPAN=_SPAN,
            )  # fmt: skip
    return loss * scale, grad


def _axis(
    size_in: int, size_out: int, scale: float, align_corners: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    starts = torch.empty(size_in + 1, dtype=torch.int32, device=device)
    lows = torch.empty(size_out, dtype=torch.int32, device=device)
    fractions = torch.empty(size_out, dtype=torch.float32, device=device)
    grid = (triton.cdiv(max(size_in + 1, size_out), _AXIS_BLOCK),)
    _axis_kernel[grid](
        starts, lows, fractions, size_in, size_out, scale, ALIGN=align_corners, BLOCK=_AXIS_BLOCK
    )
    return starts, lows, fractions


def _most_columns(size_in: int, size_out: int, scale: float) -> int:
    """At least as many as the outputs between an input's two neighbours, or beyond the edge."""
    return size_out if size_in <= 2 or scale == 0 else min(size_out, int(2.5 / scale) + 2)
