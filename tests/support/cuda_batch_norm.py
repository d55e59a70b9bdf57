"""CPU stand-ins for the five batch norm ops that PyTorch has for CUDA alone.

They compute in float64 and assert what CUDA's kernels ask of their arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from prcl_fast.models import sync_batch_norm


@contextmanager
def cuda_batch_norm() -> Iterator[None]:
    """Synchronised batch norm takes the way that it takes on CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        for function in (
            batch_norm_stats,
            batch_norm_gather_stats_with_counts,
            batch_norm_elemt,
            batch_norm_backward_reduce,
            batch_norm_backward_elemt,
        ):
            patch.setattr(torch, function.__name__, function)
        patch.setattr(sync_batch_norm, "_ops", lambda x: torch)
        yield


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_statistics(x: Tensor, *statistics: Tensor) -> None:
    for values in statistics:
        assert values.dtype == _wide(x.dtype)
        assert values.shape == (x.shape[1],)
        assert values.is_contiguous()


def _check_format(x: Tensor, *others: Tensor) -> None:
    last = x.is_contiguous(memory_format=torch.channels_last)
    for tensor in (x, *others):
        assert tensor.dtype == x.dtype
        assert tensor.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _check_parameters(x: Tensor, *parameters: Tensor | None) -> None:
    for values in parameters:
        assert values is None or values.dtype in (x.dtype, torch.float32)


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_format(x)
    values = x.double().movedim(1, 0).flatten(1)
    mean = values.mean(1)
    var = (values - mean[:, None]).square().mean(1)
    return mean.to(_wide(x.dtype)), (1 / (var + eps).sqrt()).to(_wide(x.dtype))


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
    scalar = x.dtype if running_mean is None else running_mean.dtype
    assert counts.dtype == scalar
    assert mean.dtype == invstd.dtype == _wide(scalar)
    assert counts.shape == (len(mean),)
    average, squares, n = (torch.zeros_like(counts[0], dtype=torch.float64) for _ in range(3))
    for m, inverse, count in zip(mean.double(), invstd.double(), counts.double(), strict=True):
        squares = squares + (1 / inverse.square() - eps) * count
        squares = squares + (average - m).square() * n * count / (n + count)
        average = (n * average + count * m) / (n + count)
        n = n + count
    if running_mean is not None and running_var is not None:
        running_mean.copy_((1 - momentum) * running_mean + momentum * average)
        running_var.copy_((1 - momentum) * running_var + momentum * squares / (n - 1))
    return average.to(mean.dtype), (1 / (squares / n + eps).sqrt()).to(mean.dtype)


def batch_norm_elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    _check_format(x)
    _check_statistics(x, mean, invstd)
    _check_parameters(x, weight, bias)
    y = (x.double() - mean.double().view(-1, 1, 1)) * invstd.double().view(-1, 1, 1)
    y = y if weight is None else y * weight.double().view(-1, 1, 1)
    y = y if bias is None else y + bias.double().view(-1, 1, 1)
    return y.to(x.dtype)


def batch_norm_backward_reduce(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    _check_format(x, grad_out)
    _check_statistics(x, mean, invstd)
    _check_parameters(x, weight)
    assert weight is not None or not (weight_g or bias_g)
    dy = grad_out.double()
    first = dy.sum((0, 2, 3))
    second = (dy * (x.double() - mean.double().view(-1, 1, 1))).sum((0, 2, 3))
    own, wide = None if weight is None else weight.dtype, mean.dtype
    return (
        first.to(wide) if input_g else None,
        second.to(wide) if input_g else None,
        (second * invstd.double()).to(own) if weight_g else None,
        first.to(own) if bias_g else None,
    )


def batch_norm_backward_elemt(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    _check_format(x, grad_out)
    _check_statistics(x, mean, invstd, sum_dy, sum_dy_xmu)
    assert count.dtype == torch.int32
    assert count.dim() == 1
    assert count.is_contiguous()
    m, inverse, first, second = (
        values.double().view(-1, 1, 1) for values in (mean, invstd, sum_dy, sum_dy_xmu)
    )
    total = count.sum()
    dx = grad_out.double() - first / total - (x.double() - m) * inverse.square() * second / total
    dx = dx * inverse if weight is None else dx * inverse * weight.double().view(-1, 1, 1)
    return dx.to(x.dtype)
