"""Probabilistic InfoNCE in Triton.

Forward: a program of one warp owns an anchor, whose row stays in registers. It reads its prototype, then its
negatives and the virtual ones, four rows at a time, each once. With r = 1 / (s_i + s_j) and
t = (mu_j - mu_i) r they give the scores and, weighted with exp(score - maximum), running sums of t and of
t^2 - r, rescaled where the maximum rises. Rows are added in ascending order. The positive stays out of the
sums: its weight less one is minus the sum of the others', so nothing cancels where it prevails. Scores are in
powers of two; reciprocals are right to 1 unit in the last place, logarithms to 2^-22.

Backward: the anchors are sorted by pixel, stably. The program of a pixel's first anchor adds the rows of all
that share the pixel, in ascending order, and writes the pixel; nothing else is written but zeros. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.launch import INTERPRETED, at_least, device_of, grid_of, log2, reciprocal
from prcl_fast.reference.mutual_likelihood_score import MIN_VARIANCE
from prcl_fast.reference.norm import MIN_NORM

_MIN_VARIANCE = tl.constexpr(MIN_VARIANCE)  # of s_i + s_j: clamped here, without a gradient where it was
_MIN_NORM = tl.constexpr(MIN_NORM)
_LOG_2 = tl.constexpr(0.6931471805599453)
_ROWS = 16 if INTERPRETED else 4
_DIMS_OF_A_WARP = 256
_REGISTERS = 176  # of a thread: without a limit ptxas takes 168 and spills
_SCATTER_DIMS = 256


@triton.jit
def _weight_kernel(
    anchor_index, positive_count, class_factor, weights, num_classes, num_anchors, HAS_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Weight of an anchor: its class's factor / (the class's anchors x the classes present), or 0."""
    c = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    drawn = tl.full((BLOCK,), 0, tl.int32)
    for first in range(0, num_anchors, BLOCK):
        a = first + lane
        index = tl.load(anchor_index + c * num_anchors + a, mask=a < num_anchors, other=-1)
        drawn += (index >= 0).to(tl.int32)
    present = tl.full((BLOCK,), 0, tl.int32)
    for first in range(0, num_classes, BLOCK):
        k = first + lane
        present += (tl.load(positive_count + k, mask=k < num_classes, other=0) > 0).to(tl.int32)
    num_drawn = tl.sum(drawn, 0)
    num_present = tl.sum(present, 0)
    counts = (num_drawn > 0) & (tl.load(positive_count + c) > 0)
    shares = tl.maximum(num_drawn, 1).to(tl.float32) * tl.maximum(num_present, 1).to(tl.float32)
    factor = tl.load(class_factor + c) if HAS_FACTOR else 1.0
    tl.store(weights + c, tl.where(counts, factor / shares, 0.0))


@triton.jit
def _anchor_kernel(
    mu, var, anchor_index, negative_index, positive_mean, positive_variance, virtual_mu, virtual_var,
    virtual_known, norms, weights, loss, grad_mu, grad_var, num_classes, num_anchors, anchors_per_group,
    num_negatives, num_virtual, dims, scale, POINTS: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_NORMS: tl.constexpr, NEEDS_GRAD: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = row // num_anchors
    dim = tl.arange(0, DIMS)
    inside = dim < dims
    pixel = tl.load(anchor_index + row)
    weight = tl.load(weights + c)
    counts = (pixel >= 0) & (weight > 0.0)

    mu_i = tl.load(mu + pixel * dims + dim, mask=inside & counts, other=0.0).to(tl.float32)
    s_i = tl.load(var + pixel * dims + dim, mask=inside & counts, other=1.0).to(tl.float32)
    if NORMALIZE:
        if HAS_NORMS:
            inverse_norm = tl.load(norms + pixel, mask=counts, other=0.0)
        else:
            inverse_norm = 1.0 / tl.maximum(tl.sqrt(tl.sum(mu_i * mu_i, 0)), _MIN_NORM)
        mu_i *= inverse_norm
    # All variances are positive: if the anchor's are above the clamp, no sum is at it.
    if tl.min(s_i, 0) > _MIN_VARIANCE:
        positive, t_p, slope_p, peak, total, sum_mu, sum_var = _candidates(
            mu, var, negative_index, positive_mean, positive_variance, virtual_mu, virtual_var, virtual_known,
            norms, mu_i, s_i, row, c, counts, num_classes, anchors_per_group, num_negatives, num_virtual,
            dims, scale, False, POINTS, NORMALIZE, HAS_NORMS, NEEDS_GRAD, ROWS, DIMS,
        )  # fmt: skip
    else:
        positive, t_p, slope_p, peak, total, sum_mu, sum_var = _candidates(
            mu, var, negative_index, positive_mean, positive_variance, virtual_mu, virtual_var, virtual_known,
            norms, mu_i, s_i, row, c, counts, num_classes, anchors_per_group, num_negatives, num_virtual,
            dims, scale, True, POINTS, NORMALIZE, HAS_NORMS, NEEDS_GRAD, ROWS, DIMS,
        )  # fmt: skip
    at_positive = tl.exp2(positive - peak)
    value = ((peak - positive) * _LOG_2 + _log1p(total + (at_positive - 1.0))) * weight
    tl.store(loss + row, tl.where(counts, value, 0.0))
    if NEEDS_GRAD:
        factor = weight * scale / (total + at_positive)
        to_mu = factor * (sum_mu - total * tl.reshape(t_p, (DIMS,)))
        to_var = 0.5 * factor * (sum_var - total * tl.reshape(slope_p, (DIMS,)))
        if NORMALIZE:  # d(mu / |mu|): the part across mu, over |mu|; below the clamp the norm is a constant
            along = tl.where(inverse_norm < 1.0 / _MIN_NORM, tl.sum(mu_i * to_mu, 0), 0.0)
            to_mu = (to_mu - along * mu_i) * inverse_norm
        at = row * dims + dim
        tl.store(grad_mu + at, tl.where(counts, to_mu, 0.0), mask=inside)
        tl.store(grad_var + at, tl.where(counts, to_var, 0.0), mask=inside)


@triton.jit
def _candidates(
    mu, var, negative_index, positive_mean, positive_variance, virtual_mu, virtual_var, virtual_known, norms,
    mu_i, s_i, row, c, counts, num_classes, anchors_per_group, num_negatives, num_virtual, dims, scale,
    MAY_CLAMP: tl.constexpr, POINTS: tl.constexpr, NORMALIZE: tl.constexpr, HAS_NORMS: tl.constexpr,
    NEEDS_GRAD: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The positive's score, t and t^2 - r; the largest score of all; the sums over all others."""
    dim = tl.arange(0, DIMS)
    inside = dim < dims
    mu_p = tl.load(positive_mean + c * dims + dim, mask=inside & counts, other=0.0)
    s_p = tl.load(positive_variance + c * dims + dim, mask=inside & counts, other=0.0)
    score_p, t_p, slope_p = _pairs(
        mu_i, s_i, mu_p[None, :], s_p[None, :], scale, MAY_CLAMP, NORMALIZE, 1, DIMS
    )
    positive = tl.max(score_p, 0)
    peak = positive
    total = positive * 0.0  # sum of exp(score - peak) over all but the positive
    sum_mu = tl.full((DIMS,), 0.0, tl.float32)
    sum_var = tl.full((DIMS,), 0.0, tl.float32)
    drawn = negative_index + (row // anchors_per_group) * num_negatives
    for first in range(0, tl.where(counts, num_negatives, 0), ROWS):
        j = first + tl.arange(0, ROWS)
        other = tl.load(drawn + j, mask=j < num_negatives, other=-1)
        kept = other >= 0
        read = kept[:, None] & inside[None, :]
        place = (other * dims)[:, None] + dim[None, :]
        mu_j = tl.load(mu + place, mask=read, other=0.0).to(tl.float32)
        s_j = tl.load(var + place, mask=read, other=0.0).to(tl.float32)
        if HAS_NORMS:
            mu_j *= tl.load(norms + other, mask=kept, other=0.0)[:, None]
        score, t, slope = _pairs(
            mu_i, s_i, mu_j, s_j, scale, MAY_CLAMP, NORMALIZE and not HAS_NORMS, ROWS, DIMS
        )
        peak, total, sum_mu, sum_var = _add(score, kept, t, slope, peak, total, sum_mu, sum_var, NEEDS_GRAD)
    for first in range(0, tl.where(counts, num_classes * num_virtual, 0), ROWS):
        j = first + tl.arange(0, ROWS)
        owner = j // num_virtual
        kept = (owner < num_classes) & (owner != c)
        kept = kept & (tl.load(virtual_known + owner, mask=kept, other=0) != 0)
        read = kept[:, None] & inside[None, :]
        place = (j.to(tl.int64) * dims)[:, None] + dim[None, :]
        mu_j = tl.load(virtual_mu + place, mask=read, other=0.0)
        if POINTS:
            s_j = tl.full((ROWS, DIMS), 0.0, tl.float32)
        else:
            s_j = tl.load(virtual_var + place, mask=read, other=0.0)
        score, t, slope = _pairs(mu_i, s_i, mu_j, s_j, scale, MAY_CLAMP, NORMALIZE, ROWS, DIMS)
        peak, total, sum_mu, sum_var = _add(score, kept, t, slope, peak, total, sum_mu, sum_var, NEEDS_GRAD)
    return positive, t_p, slope_p, peak, total, sum_mu, sum_var


@triton.jit
def _pairs(
    mu_i, s_i, mu_j, s_j, scale,
    MAY_CLAMP: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Scaled scores [ROWS], t and t^2 - r [ROWS, DIMS] of an anchor and rows. Padding has s_i + s_j = 1."""
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(mu_j * mu_j, 1))
        mu_j *= (1.0 / tl.maximum(norm, _MIN_NORM))[:, None]
    s = s_i[None, :] + s_j
    clamped = at_least(s, _MIN_VARIANCE) if MAY_CLAMP else s
    d = mu_j - mu_i[None, :]
    r = reciprocal(clamped)
    t = d * r
    slope = t * t - r
    if MAY_CLAMP:
        slope = tl.where(s <= _MIN_VARIANCE, 0.0, slope)
    score = tl.sum(d * t + log2(clamped) * _LOG_2, 1) * (-0.5 / _LOG_2 * scale)
    return score, t, slope


@triton.jit
def _add(score, kept, t, slope, peak, total, sum_mu, sum_var, NEEDS_GRAD: tl.constexpr):
    """The running maximum and sums with some rows added."""
    score = tl.where(kept, score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 0))
    rescale = tl.exp2(peak - higher)
    w = tl.exp2(score - higher)
    total = total * rescale + tl.sum(w, 0)
    if NEEDS_GRAD:
        sum_mu = sum_mu * rescale + tl.sum(w[:, None] * t, 0)
        sum_var = sum_var * rescale + tl.sum(w[:, None] * slope, 0)
    return higher, total, sum_mu, sum_var


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, without losing a small x."""
    y = 1.0 + x
    above = y - 1.0
    return tl.where(above > 0.0, tl.log(y) * (x / tl.where(above > 0.0, above, 1.0)), x)


def probabilistic_info_nce(
    mu: Tensor,
    var: Tensor,
    anchor_index: Tensor,
    negative_index: Tensor,
    positive_mean: Tensor,
    positive_variance: Tensor,
    positive_count: Tensor,
    virtual_mu: Tensor | None,
    virtual_var: Tensor | None,
    virtual_known: Tensor | None,
    class_factor: Tensor | None,
    inverse_norm: Tensor | None,
    tau: float,
    mean: bool,
    normalize: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar) and its gradients to the anchors' rows of mu and var, [C, A, D] each, in float32.

    The gradients are empty unless `needs_grad`. mu and var are rows [P, D], inverse_norm [B, h, w] theirs.
    """
    num_classes, num_anchors = anchor_index.shape
    num_groups, num_negatives = negative_index.shape[1:]
    dims = mu.shape[1]
    rows = num_classes * num_anchors
    losses = positive_mean.new_empty(rows)
    grad_mu = positive_mean.new_empty((num_classes, num_anchors, dims) if needs_grad else (0,))
    grad_var = torch.empty_like(grad_mu)
    weights = positive_mean.new_empty(num_classes)
    dims_block = max(16, triton.next_power_of_2(dims))
    warps = min(16, max(1, dims_block // _DIMS_OF_A_WARP))
    with device_of(mu):
        _weight_kernel[(num_classes,)](
            anchor_index, positive_count, positive_mean if class_factor is None else class_factor, weights,
            num_classes, num_anchors, HAS_FACTOR=class_factor is not None, BLOCK=128,
        )  # fmt: skip
        _anchor_kernel[(rows,)](
            mu, var, anchor_index, negative_index, positive_mean, positive_variance,
            positive_mean if virtual_mu is None else virtual_mu,
            positive_mean if virtual_var is None else virtual_var,
            (positive_count if virtual_known is None else virtual_known).view(torch.uint8),
            positive_mean if inverse_norm is None else inverse_norm, weights, losses, grad_mu, grad_var,
            num_classes, num_anchors, num_anchors // num_groups, num_negatives,
            0 if virtual_mu is None else virtual_mu.shape[1], dims, 1.0 / (tau * dims if mean else tau),
            POINTS=virtual_var is None, NORMALIZE=normalize, HAS_NORMS=inverse_norm is not None,
            NEEDS_GRAD=needs_grad, ROWS=_ROWS, DIMS=dims_block,
            num_warps=warps, maxnreg=_REGISTERS if warps <= 8 else None,
        )  # fmt: skip
    return losses.sum(), grad_mu, grad_var


@triton.jit
def _scatter_kernel(
    grad_loss, grad_mu_rows, grad_var_rows, pixels, order, ends, grad_mu, grad_var,
    dims, area, mu_pixel_stride, mu_dim_stride, var_pixel_stride, var_dim_stride, DIMS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    inside = dim < dims
    pixel = tl.load(pixels + first)
    before = tl.load(pixels + first - 1, mask=first > 0, other=-1)
    owner = pixel != before  # the first of its pixel, and not -1, which comes first of all
    scale = tl.load(grad_loss)
    sum_mu = tl.full((DIMS,), 0.0, tl.float32)
    sum_var = tl.full((DIMS,), 0.0, tl.float32)
    end = tl.load(ends + first).to(tl.int32)
    for i in range(first, tl.where(owner, end, first)):
        at = tl.load(order + i) * dims + dim
        sum_mu += tl.load(grad_mu_rows + at, mask=inside, other=0.0) * scale
        sum_var += tl.load(grad_var_rows + at, mask=inside, other=0.0) * scale
    image, pixel, dim = (pixel // area) * area * dims, pixel % area, dim.to(tl.int64)
    mu_place = image + pixel * mu_pixel_stride + dim * mu_dim_stride
    var_place = image + pixel * var_pixel_stride + dim * var_dim_stride
    tl.store(grad_mu + mu_place, sum_mu.to(grad_mu.dtype.element_ty), mask=inside & owner)
    tl.store(grad_var + var_place, sum_var.to(grad_var.dtype.element_ty), mask=inside & owner)


def probabilistic_info_nce_backward(
    grad_loss: Tensor,
    grad_mu_rows: Tensor,
    grad_var_rows: Tensor,
    anchor_index: Tensor,
    batch: int,
    height: int,
    width: int,
    mu_dtype: torch.dtype,
    var_dtype: torch.dtype,
    mu_channels_last: bool,
    var_channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """Adds the anchors' gradient rows [C, A, D], times the incoming gradient, into zeros [B, D, h, w]."""
    dims = grad_mu_rows.shape[2]
    area = height * width
    grad_mu, grad_var = (
        torch.empty(
            (batch, dims, height, width),
            dtype=dtype,
            device=grad_mu_rows.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        ).zero_()
        for dtype, channels_last in ((mu_dtype, mu_channels_last), (var_dtype, var_channels_last))
    )
    pixels, order = anchor_index.flatten().sort(stable=True)
    ends = torch.searchsorted(pixels, pixels, right=True)
    dims_block = min(_SCATTER_DIMS, triton.next_power_of_2(dims))
    strides = [
        stride
        for channels_last in (mu_channels_last, var_channels_last)
        for stride in ((dims, 1) if channels_last else (1, area))
    ]
    grid = grid_of(len(pixels), triton.cdiv(dims, dims_block))
    with device_of(grad_mu_rows):
        _scatter_kernel[grid](
            grad_loss, grad_mu_rows, grad_var_rows, pixels, order, ends, grad_mu, grad_var,
            dims, area, *strides, DIMS=dims_block, num_warps=min(4, max(1, dims_block // 64)),
        )  # fmt: skip
    return grad_mu, grad_var
