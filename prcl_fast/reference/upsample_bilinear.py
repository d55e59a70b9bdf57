"""Bilinear upsampling of a feature map, and its adjoint in gather form.

Along an axis of n inputs and N outputs, output i lies at position p_i and reads input j with the weight

    a_ij = max(0, 1 - |p_i - j|),

    p_i = i (n - 1) / (N - 1) where corners are aligned, else (i + 1/2) n / N - 1/2, cut to [0, n - 1].

With one such matrix an axis, y = A_h x A_w^T, and the gradient of x is A_h^T g A_w. Each row and column of
them holds a few weights, so that both products are sums of a few gathered rows; none adds in an order that
a device chooses, as PyTorch's own backward does on CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor


def upsample_bilinear(x: Tensor, height: int, width: int, align_corners: bool, channels_last: bool) -> Tensor:
    """[B, C, h, w] -> [B, C, height, width] of x's dtype, computed in float32, float64 for float64."""
    y = x.to(_work(x))
    for dim, size in ((2, height), (3, width)):
        inputs = x.shape[dim]
        position = _positions(inputs, size, align_corners, x.device)
        low = position.long()
        fraction = (position - low).to(y.dtype).reshape(-1, *[1] * (3 - dim))
        high = (low + 1).clamp(max=inputs - 1)
        y = y.index_select(dim, low).lerp(y.index_select(dim, high), fraction)
    return _formatted(y, x.dtype, channels_last)


def upsample_bilinear_backward(
    grad: Tensor, height: int, width: int, align_corners: bool, channels_last: bool
) -> Tensor:
    """The gradient [B, C, height, width] of an input from that of its output, `grad` [B, C, H, W]."""
    x = grad.to(_work(grad))
    for dim, size in ((2, height), (3, width)):
        outputs, weights = _readers(size, grad.shape[dim], align_corners, grad.device)
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for output, weight in zip(outputs, weights, strict=True):
            share = weight.to(x.dtype).reshape(-1, *[1] * (3 - dim))
            total = total + torch.where(share > 0, x.index_select(dim, output) * share, 0.0)
        x = total
    return _formatted(x, grad.dtype, channels_last)


def _positions(inputs: int, outputs: int, align_corners: bool, device: torch.device) -> Tensor:
    """p_i, float64 [N]."""
    i = torch.arange(outputs, dtype=torch.float64, device=device)
    scale = _scale(inputs, outputs, align_corners)
    position = i * scale if align_corners else (i + 0.5) * scale - 0.5
    return position.clamp(0, inputs - 1)


def _readers(inputs: int, outputs: int, align_corners: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The outputs that read each input, ascending, and a_ij; both [T, n]. Past the last one a_ij is 0."""
    scale = _scale(inputs, outputs, align_corners)
    most = outputs if scale == 0 else min(outputs, int(2 / scale) + 2)
    position = _positions(inputs, outputs, align_corners, device)
    j = torch.arange(inputs, dtype=torch.float64, device=device)
    first = torch.searchsorted(position, j - 1, right=True)
    i = first + torch.arange(most, device=device)[:, None]  # [T, n]
    real = i < outputs
    i = i.clamp(max=outputs - 1)
    return i, torch.where(real, 1 - (position[i] - j).abs(), 0.0).clamp(min=0)


def _scale(inputs: int, outputs: int, align_corners: bool) -> float:
    """Inputs from one output to the next."""
    if align_corners:
        return (inputs - 1) / (outputs - 1) if outputs > 1 else 0.0
    return inputs / outputs


def _work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _formatted(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout).copy_(x)
