"""The probability head's tail in Triton, on rows x [P, D].

A program owns a span of neighbouring rows and a block of channels, and reads its part of each operand once,
a tile of rows at a time. Sums: within a tile in the order of Triton's reduction, tiles in ascending order in
registers, and the programs' results, one row of a table each, in float64 in a fixed order; no atomics. The
moments of a tile are taken about its own mean and merged with those before it by the formula of Chan et al.;
all means are differences to x's first row, so that values far from zero keep their digits.

sigma^2 is made from t = e^-|z|, in which nothing overflows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.launch import device_of, grid_of
from prcl_fast.reference.variance_head import FLOOR

_SPAN = 512
_ELEMENTS = 4096  # of a tile
_FLOOR = tl.constexpr(FLOOR)


@triton.jit
def _moments_kernel(
    x, mean_out, squares_out, num_rows, dims, SPAN: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0) * SPAN
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    shift = tl.load(x + dim, mask=dim < dims, other=0.0).to(tl.float32)
    mean = tl.zeros((DIMS,), tl.float32)
    squares = tl.zeros((DIMS,), tl.float32)
    for begin in range(first, tl.minimum(first + SPAN, num_rows), ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (dim < dims)[None, :]
        at = row.to(tl.int64)[:, None] * dims + dim[None, :]
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - shift[None, :]
        count = tl.minimum(num_rows - begin, ROWS).to(tl.float32)
        before = (begin - first).to(tl.float32)
        tile_mean = tl.sum(tl.where(inside, values, 0.0), 0) / count
        centred = tl.where(inside, values - tile_mean[None, :], 0.0)
        distance = tile_mean - mean
        share = count / (before + count)
        mean += distance * share
        squares += tl.sum(centred * centred, 0) + distance * distance * before * share
    at = tl.program_id(0).to(tl.int64) * dims + dim
    tl.store(mean_out + at, mean, mask=dim < dims)
    tl.store(squares_out + at, squares, mask=dim < dims)


@triton.jit
def _sigmoid(z):
    """t = e^-|z| and d, 1 + (1 + f) t for z > 0 and else 1 + f + t."""
    t = tl.exp(-tl.abs(z))
    return t, tl.where(z > 0, 1.0 + (1.0 + _FLOOR) * t, (1.0 + _FLOOR) + t)


@triton.jit
def _forward_kernel(
    x, mean, var, gamma, beta, y, num_rows, dims, eps, ROWS: tl.constexpr, DIMS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    inside = (row < num_rows)[:, None] & (dim < dims)[None, :]
    at = row.to(tl.int64)[:, None] * dims + dim[None, :]
    inverse_std = 1.0 / tl.sqrt(tl.load(var + dim, mask=dim < dims, other=1.0) + eps)
    centred = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - tl.load(
        mean + dim, mask=dim < dims, other=0.0
    )
    z = centred * (tl.load(gamma) * inverse_std)[None, :] + tl.load(beta)
    t, d = _sigmoid(z)
    tl.store(y + at, tl.where(z > 0, 1.0 + _FLOOR * t, t + _FLOOR) / d, mask=inside)


@triton.jit
def _sums_kernel(
    grad, x, mean, var, gamma, beta, sums, num_rows, dims, eps,
    SPAN: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * SPAN
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    inverse_std = 1.0 / tl.sqrt(tl.load(var + dim, mask=dim < dims, other=1.0) + eps)
    shift = tl.load(mean + dim, mask=dim < dims, other=0.0)
    gain, bias = tl.load(gamma), tl.load(beta)
    total = tl.zeros((DIMS,), tl.float32)
    product = tl.zeros((DIMS,), tl.float32)
    for begin in range(first, tl.minimum(first + SPAN, num_rows), ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (dim < dims)[None, :]
        at = row.to(tl.int64)[:, None] * dims + dim[None, :]
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        xhat = (values - shift[None, :]) * inverse_std[None, :]
        t, d = _sigmoid(gain * xhat + bias)
        grad_z = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * t / (d * d)
        total += tl.sum(grad_z, 0)
        product += tl.sum(grad_z * xhat, 0)
    at = tl.program_id(0).to(tl.int64) * 2 * dims + dim
    tl.store(sums + at, total, mask=dim < dims)
    tl.store(sums + at + dims, product, mask=dim < dims)


@triton.jit
def _backward_kernel(
    grad, x, mean, var, gamma, beta, means, grad_x, num_rows, dims, eps,
    HAS_MEANS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    inside = (row < num_rows)[:, None] & (dim < dims)[None, :]
    at = row.to(tl.int64)[:, None] * dims + dim[None, :]
    inverse_std = 1.0 / tl.sqrt(tl.load(var + dim, mask=dim < dims, other=1.0) + eps)
    shift = tl.load(mean + dim, mask=dim < dims, other=0.0)
    gain = tl.load(gamma)
    xhat = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - shift[None, :]) * inverse_std[None, :]
    t, d = _sigmoid(gain * xhat + tl.load(beta))
    grad_z = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * t / (d * d)
    if HAS_MEANS:
        constant = tl.load(means + dim, mask=dim < dims, other=0.0)
        slope = tl.load(means + dims + dim, mask=dim < dims, other=0.0)
        grad_z = grad_z - constant[None, :] - slope[None, :] * xhat
    tl.store(grad_x + at, grad_z * (gain * inverse_std)[None, :], mask=inside)


def variance_head_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [D] float32 of the rows x [P, D]."""
    num_rows, dims = x.shape
    spans = triton.cdiv(num_rows, _SPAN)
    means = torch.empty(spans, dims, dtype=torch.float32, device=x.device)
    squares = torch.empty_like(means)
    rows_block, dims_block = _tile(dims)
    grid = grid_of(spans, triton.cdiv(dims, dims_block))
    with device_of(x):
        _moments_kernel[grid](x, means, squares, num_rows, dims, SPAN=_SPAN, ROWS=rows_block, DIMS=dims_block)
    weights = torch.full((spans, 1), _SPAN / num_rows, dtype=torch.float64, device=x.device)
    weights[-1] = 1 - (spans - 1) * _SPAN / num_rows
    mean = (means * weights).sum(0)
    var = squares.sum(0, dtype=torch.float64) / num_rows + ((means - mean).square_() * weights).sum(0)
    return (x[0].double() + mean).float(), var.float()


def variance_head(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """sigma^2 [P, D] of the rows x [P, D]."""
    num_rows, dims = x.shape
    y = torch.empty(num_rows, dims, dtype=dtype, device=x.device)
    rows_block, dims_block = _tile(dims)
    grid = grid_of(triton.cdiv(num_rows, rows_block), triton.cdiv(dims, dims_block))
    with device_of(x):
        _forward_kernel[grid](
            x, mean, var, gamma, beta, y, num_rows, dims, eps, ROWS=rows_block, DIMS=dims_block
        )
    return y


def variance_head_backward_sums(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> Tensor:
    """[2, D] float32: the sums over rows of dz and of dz * xhat."""
    num_rows, dims = x.shape
    spans = triton.cdiv(num_rows, _SPAN)
    sums = torch.empty(spans, 2, dims, dtype=torch.float32, device=x.device)
    rows_block, dims_block = _tile(dims)
    grid = grid_of(spans, triton.cdiv(dims, dims_block))
    with device_of(x):
        _sums_kernel[grid](
            grad, x, mean, var, gamma, beta, sums, num_rows, dims, eps,
            SPAN=_SPAN, ROWS=rows_block, DIMS=dims_block,
        )  # fmt: skip
    return sums.sum(0, dtype=torch.float64).float()


def variance_head_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor,
    beta: Tensor,
    means: Tensor | None,
    eps: float,
) -> Tensor:
    """The gradient of the rows x [P, D]."""
    num_rows, dims = x.shape
    grad_x = torch.empty_like(x)
    rows_block, dims_block = _tile(dims)
    grid = grid_of(triton.cdiv(num_rows, rows_block), triton.cdiv(dims, dims_block))
    with device_of(x):
        _backward_kernel[grid](
            grad, x, mean, var, gamma, beta, mean if means is None else means, grad_x, num_rows, dims, eps,
            HAS_MEANS=means is not None, ROWS=rows_block, DIMS=dims_block,
        )  # fmt: skip
    return grad_x


def _tile(dims: int) -> tuple[int, int]:
    """Rows and channels of a tile, powers of two."""
    dims_block = min(128, triton.next_power_of_2(dims))
    return min(_SPAN, _ELEMENTS // dims_block), dims_block
