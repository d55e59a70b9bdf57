"""Bilinear upsampling of a feature map, and its adjoint in gather form.

Along an axis of n inputs and N outputs, output i lies at position p_i = i (n - 1) / (N - 1) and reads input j
with the weight a_ij = max(0, 1 - |p_i - j|). With one such matrix an axis, y = A_h x A_w^T, and the gradient
of x is A_h^T g A_w. Each row and column of them holds a few weights, so that both products are sums of a few
gathered rows; none adds in an order that a device chooses, as PyTorch's own backward does on CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor


def upsample_bilinear(x: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    """[B, C, h, w] -> [B, C, height, width] of x's dtype, computed in float32, float64 for float64."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    for dim, size in ((2, height), (3, width)):
        position = _positions(x.shape[dim], size, x.device)
        low = position.long()
        fraction = (position - low).to(y.dtype).reshape(-1, *[1] * (3 - dim))
        y = y.index_select(dim, low).lerp(
            y.index_select(dim, (low + 1).clamp(max=x.shape[dim] - 1)), fraction
        )
    return _formatted(y, x.dtype, channels_last)


def upsample_bilinear_backward(grad: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    """The gradient [B, C, height, width] of an input from that of its output, `grad` [B, C, H, W]."""
    x = grad.to(torch.promote_types(grad.dtype, torch.float32))
    for dim, size in ((2, height), (3, width)):
        outputs, weights = _readers(size, grad.shape[dim], grad.device)
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for output, weight in zip(outputs, weights, strict=True):
            share = weight.to(x.dtype).reshape(-1, *[1] * (3 - dim))
            total = total + torch.where(share > 0, x.index_select(dim, output) * share, 0.0)
        x = total
    return _formatted(x, grad.dtype, channels_last)


def _positions(inputs: int, outputs: int, device: torch.device) -> Tensor:
    """p_i, float64 [N]."""
    i = torch.arange(outputs, dtype=torch.float64, device=device)
    return (i * ((inputs - 1) / max(outputs - 1, 1))).clamp(max=inputs - 1)


def _readers(inputs: int, outputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The outputs that read each input, ascending, and a_ij; both [T, n]. Past the last one a_ij is 0."""
    most = outputs if inputs == 1 else min(outputs, 2 * (outputs - 1) // (inputs - 1) + 2)
    position = _positions(inputs, outputs, device)
    j = torch.arange(inputs, dtype=torch.float64, device=device)
    i = torch.searchsorted(position, j - 1, right=True) + torch.arange(most, device=device)[:, None]  # [T, n]
    distance = (position[i.clamp(max=outputs - 1)] - j).abs()
    return i.clamp(max=outputs - 1), torch.where(i < outputs, 1 - distance, 0.0).clamp(min=0)


def _formatted(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout).copy_(x)
