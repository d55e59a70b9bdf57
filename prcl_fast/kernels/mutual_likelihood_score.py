"""Mutual likelihood score in Triton.

Forward: a program owns a 64 x 64 tile of scores, in registers, and walks over the dimensions two at a time.
The operands are transposed to [B, D, rows] first, so that one dimension of the tile's rows is one contiguous
read. The logarithm is taken of the product of two sums s. Sums run over D in ascending order.

Backward, one side: a program owns 16 rows x and 64 dimensions and walks over all rows y in ascending order;
each row y and the gradients of its 16 pairs are read once. No atomics: deterministic. The other side is a
second launch with the roles exchanged.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.launch import at_least, device_of, grid_of
from prcl_fast.reference.mutual_likelihood_score import MIN_VARIANCE

_MIN_VARIANCE = tl.constexpr(MIN_VARIANCE)
_LOG_TWO_PI = tl.constexpr(math.log(2 * math.pi))
_TILE = 64
_ROWS = 16
_DIMS = 64


@triton.jit
def _forward_kernel(mu_a, var_a, mu_b, var_b, out, m, n, dims, MEAN: tl.constexpr, TILE: tl.constexpr):
    dtype = out.dtype.element_ty
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    smallest = tl.full((1, 1), _MIN_VARIANCE, dtype)
    total = tl.zeros((TILE, TILE), dtype)
    at_a = batch * dims * m + row
    at_b = batch * dims * n + column
    for first in range(0, dims, 2):
        real = first + 1 < dims  # odd D: the padding dimension has mean 0 and variances summing to 1
        mu_a0 = tl.load(mu_a + at_a, mask=row < m, other=0.0)
        mu_a1 = tl.load(mu_a + at_a + m, mask=(row < m) & real, other=0.0)
        var_a0 = tl.load(var_a + at_a, mask=row < m, other=0.5)
        var_a1 = tl.load(var_a + at_a + m, mask=(row < m) & real, other=0.5)
        mu_b0 = tl.load(mu_b + at_b, mask=column < n, other=0.0)
        mu_b1 = tl.load(mu_b + at_b + n, mask=(column < n) & real, other=0.0)
        var_b0 = tl.load(var_b + at_b, mask=column < n, other=0.5)
        var_b1 = tl.load(var_b + at_b + n, mask=(column < n) & real, other=0.5)
        s0 = at_least(var_a0[:, None] + var_b0[None, :], smallest)
        s1 = at_least(var_a1[:, None] + var_b1[None, :], smallest)
        d0 = mu_a0[:, None] - mu_b0[None, :]
        d1 = mu_a1[:, None] - mu_b1[None, :]
        total += d0 * d0 / s0 + d1 * d1 / s1 + tl.log(s0 * s1)
        at_a += 2 * m
        at_b += 2 * n
    if MEAN:
        score = total * -0.5 / tl.full((1, 1), dims, dtype)
    else:
        score = (total + tl.full((1, 1), dims, dtype) * tl.full((1, 1), _LOG_TWO_PI, dtype)) * -0.5
    place = (batch * m + row[:, None]) * n + column[None, :]
    tl.store(out + place, score, mask=(row < m)[:, None] & (column < n)[None, :])


@triton.jit
def _backward_kernel(
    grad, mu_x, var_x, mu_y, var_y, grad_mu, grad_var, m, n, dims, stride_x, stride_y,
    MEAN: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    dtype = grad_mu.dtype.element_ty
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.program_id(1).to(tl.int64) * DIMS + tl.arange(0, DIMS)
    inside = (row < m)[:, None] & (dim < dims)[None, :]
    place = (batch * m + row[:, None]) * dims + dim[None, :]
    mu = tl.load(mu_x + place, mask=inside, other=0.0)
    var = tl.load(var_x + place, mask=inside, other=1.0)
    smallest = tl.full((1, 1), _MIN_VARIANCE, dtype)
    sum_mu = tl.zeros((ROWS, DIMS), dtype)
    sum_var = tl.zeros((ROWS, DIMS), dtype)
    at_y = batch * n * dims + dim
    at_grad = batch * m * n + row * stride_x
    for _ in range(0, n):
        mu_j = tl.load(mu_y + at_y, mask=dim < dims, other=0.0)
        var_j = tl.load(var_y + at_y, mask=dim < dims, other=1.0)
        g = tl.load(grad + at_grad, mask=row < m, other=0.0)
        s = var + var_j[None, :]
        r = 1.0 / at_least(s, smallest)
        t = (mu - mu_j[None, :]) * r
        sum_mu -= g[:, None] * t
        sum_var += tl.where(s < smallest, 0.0, g[:, None] * (t * t - r))
        at_y += dims
        at_grad += stride_y
    if MEAN:
        sum_mu /= tl.full((1, 1), dims, dtype)
        sum_var /= tl.full((1, 1), dims, dtype)
    tl.store(grad_mu + place, sum_mu, mask=inside)
    tl.store(grad_var + place, sum_var * 0.5, mask=inside)


def mutual_likelihood_score(mu_a: Tensor, var_a: Tensor, mu_b: Tensor, var_b: Tensor, mean: bool) -> Tensor:
    """Scores [B, M, N] of mu_a, var_a [B, M, D] and mu_b, var_b [B, N, D], float32 or float64."""
    batches, m, dims = mu_a.shape
    n = mu_b.shape[1]
    out = mu_a.new_empty(batches, m, n)
    if out.numel() == 0:
        return out
    operands = [value.transpose(1, 2).contiguous() for value in (mu_a, var_a, mu_b, var_b)]
    grid = grid_of(triton.cdiv(n, _TILE), triton.cdiv(m, _TILE), batches)
    with device_of(mu_a):
        _forward_kernel[grid](*operands, out, m, n, dims, MEAN=mean, TILE=_TILE, num_warps=8)
    return out


def mutual_likelihood_score_backward(
    grad: Tensor,
    mu_a: Tensor,
    var_a: Tensor,
    mu_b: Tensor,
    var_b: Tensor,
    mean: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of mu_a, var_a, mu_b, var_b for those of the scores, grad [B, M, N]; [0] where not needed."""
    batches, m, dims = mu_a.shape
    n = mu_b.shape[1]
    grad = grad.contiguous()
    a = (mu_a.contiguous(), var_a.contiguous())
    b = (mu_b.contiguous(), var_b.contiguous())
    nothing = (grad.new_empty(0), grad.new_empty(0))
    side_a = _one_side(grad, a, b, (batches, m, n, dims), (n, 1), mean) if need_a else nothing
    side_b = _one_side(grad, b, a, (batches, n, m, dims), (1, n), mean) if need_b else nothing
    return (*side_a, *side_b)


def _one_side(
    grad: Tensor,
    x: tuple[Tensor, Tensor],
    y: tuple[Tensor, Tensor],
    sizes: tuple[int, int, int, int],
    strides: tuple[int, int],
    mean: bool,
) -> tuple[Tensor, Tensor]:
    batches, m, n, dims = sizes
    grad_mu, grad_var = torch.empty_like(x[0]), torch.empty_like(x[1])
    if grad_mu.numel() == 0:
        return grad_mu, grad_var
    grid = grid_of(triton.cdiv(m, _ROWS), triton.cdiv(dims, _DIMS), batches)
    with device_of(grad):
        shape = (m, n, dims, *strides)
        _backward_kernel[grid](grad, *x, *y, grad_mu, grad_var, *shape, MEAN=mean, ROWS=_ROWS, DIMS=_DIMS)
    return grad_mu, grad_var
