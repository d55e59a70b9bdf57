"""Cross-entropy of bilinearly upsampled logits in Triton.

A program of two warps owns at most 16 neighbouring columns of 16 input rows and walks down them, a thread to
an output column. A row and the next one form a strip; each output pixel lies in one strip, between two
columns. The thread interpolates both rows of a strip at its column once, and each logit between them with one
multiply-add. It holds all classes of a pixel in registers: one visit gives the softmax, the loss and the
gradient by each logit, which adds to the strip's upper row and, weighted otherwise, to its lower row, which
is kept for the next strip. A finished row goes from output to input columns by a product with the matrix
[outputs, columns] of the interpolation's weights, on tensor cores. Both factors are split into two numbers of
11 bits; only the product of the two smaller parts, 2^-22 of the whole, is left out.

Each input value is written once, by its owner, after sums in a fixed order, without atomics. A pixel that
touches two programs is worked out by both; the owner of its upper left neighbour counts its loss.

More than 21 classes do not fit in registers. Then a kernel that walks over the classes makes the loss and
log-sum-exp of each pixel, and the walk above is made for 16 classes at a time. Logits are in units of log 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.interpolation import axis_scale, bilinear, corners, taps
from prcl_fast.kernels.launch import INTERPRETED, device_of, grid_of, log2, reciprocal

_LOG2_E, _LOG_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# Classes whose logits and gradients a thread keeps in registers: all, if they are no more than the first.
_MOST_CLASSES, _CLASSES = 21, 16
_ROWS = 16
# Output columns at a time, and the most input columns of a program.
_SPAN, _COLUMNS = (512, 128) if INTERPRETED else (64, 16)
_BLOCK = 512
_COUNT_BLOCK = 2**16 if INTERPRETED else 4096
_AXIS_BLOCK = 64


@triton.jit
def _count_kernel(target, counts, pixels, ignore_index, BLOCK: tl.constexpr):
    """The number of pixels that are not ignored."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    wanted = tl.load(target + pixel, mask=inside, other=0).to(tl.int64)
    tl.store(counts + tl.program_id(0), tl.sum((inside & (wanted != ignore_index)).to(tl.int32), 0))


@triton.jit
def _loss_kernel(
    logits, target, weight, losses, log_sums, ignore_index, num_classes, height, width, area_out,
    width_out, scale_y, scale_x, stride_b, stride_c, stride_y, stride_x, weight_stride_b, weight_stride_pixel,
    NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < area_out
    at_00, at_01, at_10, at_11, fraction_y, fraction_x = corners(
        tl.where(inside, pixel, 0), height, width, width_out, scale_y, scale_x, stride_y, stride_x
    )
    wanted = tl.load(target + image * area_out + pixel, mask=inside, other=0).to(tl.int64)
    kept = inside & (wanted != ignore_index)
    plane = logits + image * stride_b
    largest = bilinear(plane, at_00, at_01, at_10, at_11, fraction_y, fraction_x) * _LOG2_E
    picked = largest
    total = tl.full((BLOCK,), 1.0, tl.float32)
    for c in range(1, num_classes):
        plane += stride_c
        logit = bilinear(plane, at_00, at_01, at_10, at_11, fraction_y, fraction_x) * _LOG2_E
        higher = logit > largest
        ratio = tl.exp2(-tl.abs(logit - largest))
        total = tl.where(higher, total * ratio + 1.0, total + ratio)
        largest = tl.where(higher, logit, largest)
        picked = tl.where(wanted == c, logit, picked)
    factor = tl.load(weight + image * weight_stride_b + pixel * weight_stride_pixel, mask=kept, other=0.0)
    log_sum = largest + log2(total)
    slot = image * tl.num_programs(0) + tl.program_id(0)
    tl.store(losses + slot, tl.sum(tl.where(kept, (log_sum - picked) * factor, 0.0), 0) * _LOG_2)
    if NEEDS_GRAD:
        tl.store(log_sums + image * area_out + pixel, log_sum, mask=inside)


@triton.jit
def _axis_kernel(starts, lows, fractions, size_in, size_out, scale, BLOCK: tl.constexpr):
    """Tables of one axis: each output's lower neighbour and fraction, and where each input's outputs begin.

    starts[k], k = 0 .. size_in, is the first output whose lower neighbour is input k or a later one.
    """
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, _high, fraction = taps(k, size_in, scale)
    tl.store(lows + k, low, mask=k < size_out)
    tl.store(fractions + k, fraction, mask=k < size_out)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, size_out, BLOCK):
        i = first + tl.arange(0, BLOCK)
        low_i, _, _ = taps(i, size_in, scale)
        before += tl.sum(((low_i[None, :] < k[:, None]) & (i < size_out)[None, :]).to(tl.int32), 1)
    tl.store(starts + k, before, mask=k <= size_in)


@triton.jit
def _tile_kernel(
    logits, target, weight, log_sums, scale, starts_y, fractions_y, starts_x, lows_x, fractions_x,
    losses, grad, ignore_index, num_classes, height, width, height_out, width_out, columns,
    stride_b, stride_c, stride_y, stride_x, weight_stride_b, weight_stride_pixel,
    CLASSES: tl.constexpr, PADDED: tl.constexpr, ALL: tl.constexpr, NEEDS_GRAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(num_classes, CLASSES)
    image = (tl.program_id(0) // groups).to(tl.int64)
    first_class = (tl.program_id(0) % groups) * CLASSES
    c = first_class + tl.arange(0, PADDED)[:, None]
    real = tl.arange(0, PADDED)[:, None] < CLASSES
    first_row = tl.program_id(1) * ROWS
    first_column = tl.program_id(2) * columns
    last_column = tl.minimum(first_column + columns, width) - 1
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    target += image * height_out * width_out
    log_sums += image * height_out * width_out
    weight += image * weight_stride_b
    to_class = tl.arange(0, PADDED)[:, None]
    if not ALL:
        to_class = tl.minimum(to_class, num_classes - 1 - first_class)
    to_class = to_class.to(tl.int64) * stride_c
    halo = tl.maximum(first_row - 1, 0)
    first_row_at = (
        logits + image * stride_b + first_class.to(tl.int64) * stride_c + halo.to(tl.int64) * stride_y
    )
    # The output columns that touch a column: those between it and its neighbours on both sides.
    begin = tl.load(starts_x + tl.maximum(first_column - 1, 0))
    end = tl.load(starts_x + last_column + 1)
    loss = tl.zeros((SPAN,), tl.float32)
    for first in range(begin, tl.maximum(end, begin + 1), SPAN):  # where none does, zeros are written
        x = first + tl.arange(0, SPAN)
        touches = x < end
        low = tl.load(lows_x + x, mask=touches, other=0)
        high = tl.minimum(low + 1, width - 1)
        fraction = tl.load(fractions_x + x, mask=touches, other=0.0)
        owned = touches & (low >= first_column) & (low <= last_column)
        shares = tl.where(low[:, None] == column, 1.0 - fraction[:, None], 0.0)
        shares += tl.where(high[:, None] == column, fraction[:, None], 0.0)
        left = low.to(tl.int64) * stride_x
        right = high.to(tl.int64) * stride_x
        row_at = first_row_at
        top = _across(row_at + left, row_at + right, fraction, to_class, real)
        upper = tl.zeros((PADDED, SPAN), tl.float32)
        for row in range(halo, tl.minimum(first_row + ROWS, height)):
            last = row == height - 1  # the last row is its own lower neighbour
            row_at += tl.where(last, 0, stride_y)
            difference = _across(row_at + left, row_at + right, fraction, to_class, real) - top
            lower = tl.zeros((PADDED, SPAN), tl.float32)
            for y in range(tl.load(starts_y + row), tl.load(starts_y + row + 1)):
                depth = tl.load(fractions_y + y)
                pixel = y * width_out + x
                wanted = tl.load(target + pixel, mask=touches, other=0)
                kept = touches & (wanted.to(tl.int64) != ignore_index)
                factor = tl.load(weight + pixel * weight_stride_pixel, mask=kept, other=0.0)
                hit = real & (wanted.to(tl.int32)[None, :] == c)
                logit = top + depth * difference
                if ALL:
                    peak = tl.max(tl.where(real, logit, float("-inf")), 0)
                    probability = tl.where(real, tl.exp2(logit - peak[None, :]), 0.0)
                    total = tl.sum(probability, 0)
                    picked = tl.sum(tl.where(hit, logit, 0.0), 0)
                    value = (peak - picked + log2(total)) * factor
                    loss += tl.where(kept & owned & (row >= first_row), value, 0.0)
                    share = factor * reciprocal(total)
                else:
                    log_sum = tl.load(log_sums + pixel, mask=kept, other=float("inf"))
                    probability = tl.exp2(logit - log_sum[None, :])
                    share = factor
                if NEEDS_GRAD:
                    slope = probability * share[None, :] - tl.where(hit, factor[None, :], 0.0)
                    upper += slope
                    lower += depth * slope
            top += difference
            if NEEDS_GRAD:
                value = upper - tl.where(last, 0.0, lower)
                upper = lower
                # Recomputed per row to save 64 registers, which the two take in a tensor core's layout.
                shares_high, shares_low = _split(shares * tl.load(scale))
                value_high, value_low = _split(value)
                gathered = tl.dot(value_low, shares_high, input_precision="tf32")
                gathered = tl.dot(value_high, shares_low, gathered, input_precision="tf32")
                gathered = tl.dot(value_high, shares_high, gathered, input_precision="tf32")
                at = grad + ((image * num_classes + c) * height + row) * width + column
                inside = real & (c < num_classes) & (column <= last_column) & (row >= first_row)
                if first != begin:  # more outputs touch the columns than a program has threads
                    tl.debug_barrier()
                    gathered += tl.load(at, mask=inside, other=0.0)
                tl.store(at, gathered, mask=inside)
    if ALL:
        slot = (image * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
        tl.store(losses + slot, tl.sum(loss, 0) * _LOG_2)


@triton.jit
def _split(x):
    """x as a sum of what a tensor core reads of a float32, its first 11 bits, and the rest."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _across(left, right, fraction, to_class, real):
    """One input row at each output column, all classes."""
    at_left = _load(left[None, :] + to_class, real) * _LOG2_E
    at_right = _load(right[None, :] + to_class, real) * _LOG2_E
    return at_left + fraction[None, :] * (at_right - at_left)


@triton.jit
def _load(at, real):
    """Values [classes, outputs], read as one list: so all classes of an output are one thread's.

    Read as a matrix, Triton may give neighbouring classes to a warp's lanes, and sums over classes shuffle.
    """
    listed = tl.load(tl.ravel(at), mask=tl.ravel(tl.broadcast_to(real, at.shape)), other=0.0)
    return tl.reshape(listed, at.shape).to(tl.float32)


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    mean: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and its gradient [B, C, h, w], empty unless `needs_grad`; both float32."""
    batch, num_classes, height, width = logits.shape
    height_out, width_out = target.shape[1:]
    area_out = height_out * width_out
    device = logits.device
    scale_y = axis_scale(height, height_out)
    scale_x = axis_scale(width, width_out)
    if weight is None:
        weight = torch.ones(1, dtype=torch.float32, device=device)
        weight_strides = (0, 0)
    else:
        weight_strides = (1, 0) if weight.dim() == 1 else (area_out, 1)
    at_once = num_classes <= _MOST_CLASSES
    columns = _columns(width, scale_x)
    tiles = (triton.cdiv(height, _ROWS), triton.cdiv(width, columns))
    blocks = triton.cdiv(area_out, _BLOCK)
    losses = torch.empty(
        batch * (tiles[0] * tiles[1] if at_once else blocks), dtype=torch.float32, device=device
    )
    log_sums = torch.empty(
        target.shape if needs_grad and not at_once else (0,), dtype=torch.float32, device=device
    )
    grad = torch.empty(logits.shape if needs_grad else (0,), dtype=torch.float32, device=device)
    with device_of(logits):
        scale = _scale(target, ignore_index, mean)
        if not at_once:
            _loss_kernel[grid_of(blocks, batch)](
                logits, target, weight, losses, log_sums, ignore_index, num_classes, height, width,
                area_out, width_out, scale_y, scale_x, *logits.stride(), *weight_strides,
                NEEDS_GRAD=needs_grad, BLOCK=_BLOCK,
            )  # fmt: skip
        if at_once or needs_grad:
            starts_y, _, fractions_y = _axis(height, height_out, scale_y, device)
            axis_x = _axis(width, width_out, scale_x, device)
            classes = num_classes if at_once else _CLASSES
            _tile_kernel[grid_of(batch * triton.cdiv(num_classes, classes), *tiles)](
                logits, target, weight, log_sums, scale, starts_y, fractions_y, *axis_x, losses, grad,
                ignore_index, num_classes, height, width, height_out, width_out, columns,
                *logits.stride(), *weight_strides,
                CLASSES=classes, PADDED=max(16, triton.next_power_of_2(classes)), ALL=at_once,
                NEEDS_GRAD=needs_grad, ROWS=_ROWS, COLUMNS=_COLUMNS, SPAN=_SPAN, num_warps=_SPAN // 32,
            )  # fmt: skip
        loss = losses.sum() * scale
    return loss, grad


def _columns(width: int, scale: float) -> int:
    """Input columns of a program, at most _COLUMNS: as many as its threads have outputs for, if any."""
    fitting = int(_SPAN * scale) - 1  # n columns are touched by the outputs of n + 1 steps between inputs
    most = max(1, min(_COLUMNS, width, fitting))
    return triton.cdiv(width, triton.cdiv(width, most))


def _scale(target: Tensor, ignore_index: int, mean: bool) -> Tensor:
    """The factor of the sum of the losses, a scalar."""
    if not mean:
        return torch.ones((), dtype=torch.float32, device=target.device)
    blocks = triton.cdiv(target.numel(), _COUNT_BLOCK)
    counts = torch.empty(blocks, dtype=torch.int32, device=target.device)
    _count_kernel[(blocks,)](target, counts, target.numel(), ignore_index, BLOCK=_COUNT_BLOCK)
    return counts.sum().clamp(min=1).float().reciprocal()


def _axis(size_in: int, size_out: int, scale: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    starts = torch.empty(size_in + 1, dtype=torch.int32, device=device)
    lows = torch.empty(size_out, dtype=torch.int32, device=device)
    fractions = torch.empty(size_out, dtype=torch.float32, device=device)
    grid = (triton.cdiv(max(size_in + 1, size_out), _AXIS_BLOCK),)
    _axis_kernel[grid](starts, lows, fractions, size_in, size_out, scale, BLOCK=_AXIS_BLOCK)
    return starts, lows, fractions
