"""CPU versions of the ops of PyTorch's synchronised batch norm.

`torch` has the same names for CUDA only. Statistics are float32, or float64 for float64 inputs.
`invstd` is 1 / sqrt(var + eps) of the biased variance; the sums of the backward pass are those of dy and of
dy (x - mean).
"""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.device import full_precision


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """mean [C] and invstd [C] of x [B, C, h, w]."""
    var, mean = torch.var_mean(full_precision(x), dim=(0, 2, 3), correction=0)
    return mean, (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """mean [C] and invstd [C] over the values of W processes; updates the running statistics in place.

    Args:
        x: unused; CUDA's op takes its dtype from it.
        mean, invstd: [W, C].
        counts: [W], values per channel of each process.
    """
    weight = (counts.double() / counts.double().sum())[:, None]
    means, variances = mean.double(), invstd.double().square().reciprocal() - eps
    whole_mean = (weight * means).sum(0)
    var = (weight * (variances + (means - whole_mean).square())).sum(0).clamp(min=0)
    if running_mean is not None and running_var is not None:
        total = counts.double().sum()
        unbiased = var * (total / (total - 1))
        running_mean.lerp_(whole_mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return whole_mean.to(mean.dtype), (var + eps).rsqrt().to(invstd.dtype)


def batch_norm_elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    """(x - mean) * invstd, times weight, plus bias: [B, C, h, w], dtype and memory format of x."""
    scale = invstd if weight is None else invstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return torch.addcmul(_per_channel(shift), full_precision(x), _per_channel(scale)).to(x.dtype)


def batch_norm_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum of dy [C], sum of dy (x - mean) [C], gradient of the weight [C], gradient of the bias [C]."""
    wide = full_precision(grad)
    sum_dy = wide.sum((0, 2, 3))
    sum_dy_xmu = (wide * (full_precision(x) - _per_channel(mean))).sum((0, 2, 3))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def batch_norm_backward_elemt(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    """Gradient of x, with the sums [C] of all processes and their counts [W] int32."""
    total = count.sum()
    scale = invstd if weight is None else invstd * weight
    slope = invstd.square() * (sum_dy_xmu / total)
    centred = full_precision(grad) - _per_channel(sum_dy / total)
    centred = torch.addcmul(centred, full_precision(x) - _per_channel(mean), _per_channel(slope), value=-1)
    return (centred * _per_channel(scale)).to(x.dtype)


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]
