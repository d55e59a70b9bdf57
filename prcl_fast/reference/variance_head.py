"""The probability head's tail in plain PyTorch: batch norm without affine part, gain, bias, floored sigmoid.

    xhat = (x - mean) / sqrt(var + eps),  z = gamma * xhat + beta,
    sigma^2 = sigmoid(log(e^z + f)) = (e^z + f) / (1 + f + e^z),  f = 1e-6,

per channel of x [B, D, h, w]. The papers give the layers alone, Linear-BN-ReLU-Linear-BN ([AAAI] and [IJCV],
network structure); gain, bias and floored sigmoid are those of the authors' public code. With t = e^-|z|
nothing overflows: sigma^2 is (1 + f t) / (1 + (1 + f) t) for z > 0, and else (t + f) / (1 + f + t).
"""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.memory_format import memory_format_of

FLOOR = 1e-6


def variance_head_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, [D] each, in float32 (float64 for float64 x)."""
    var, mean = torch.var_mean(_wide(x), dim=(0, 2, 3), correction=0)
    return mean, var


def variance_head(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """sigma^2 [B, D, h, w] in `dtype` and x's memory format."""
    z = gamma * _normalized(x, mean, var, eps) + beta
    t = torch.exp(-z.abs())
    y = torch.where(z > 0, 1 + FLOOR * t, t + FLOOR) / _denominator(z, t)
    return y.to(dtype).contiguous(memory_format=memory_format_of(x))


def variance_head_backward_sums(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> Tensor:
    """[2, D]: each channel's sums of dz and of dz * xhat over the pixels; dz is the gradient of z."""
    xhat = _normalized(x, mean, var, eps)
    dz = _grad_z(grad, gamma * xhat + beta)
    return torch.stack([dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3))])


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
    """The gradient gamma / sqrt(var + eps) * (dz - m_0 - m_1 * xhat) of x, in its dtype and memory format.

    `means` is m [2, D], the sums of `variance_head_backward_sums` over the pixels of which `mean` and `var`
    were taken, divided by their number; None where these two are constants.
    """
    xhat = _normalized(x, mean, var, eps)
    dz = _grad_z(grad, gamma * xhat + beta)
    if means is not None:
        dz = dz - means[0, :, None, None] - means[1, :, None, None] * xhat
    grad_x = gamma * (var + eps).rsqrt()[:, None, None] * dz
    return grad_x.to(x.dtype).contiguous(memory_format=memory_format_of(x))


def _normalized(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (_wide(x) - mean[:, None, None]) * (var + eps).rsqrt()[:, None, None]


def _denominator(z: Tensor, t: Tensor) -> Tensor:
    return torch.where(z > 0, 1 + (1 + FLOOR) * t, 1 + FLOOR + t)


def _grad_z(grad: Tensor, z: Tensor) -> Tensor:
    """d sigma^2 / dz = e^z / (1 + f + e^z)^2: for either sign t over the denominator's square."""
    t = torch.exp(-z.abs())
    return _wide(grad) * t / _denominator(z, t).square()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
