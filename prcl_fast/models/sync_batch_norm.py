"""Synchronised batch norm over the images of all processes, on CUDA and on the CPU.

A layer needs one all-gather of [2C + 1] numbers in its forward pass and one all-reduce of [2C] in its
backward pass. The number of values of each process follows from shapes: the host reads nothing, and a CUDA
graph can capture the layer.

An op that computes batch statistics itself, as the variance head does, uses `is_synchronized` and
`merged_moments`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prcl_fast.memory_format import memory_format_of
from prcl_fast.models import batch_norm_ops
from prcl_fast.models.batch_norm import BatchNorm2d
from prcl_fast.processes.collectives import gathered, summed, world_size


def synchronize_batch_norm(network: nn.Module) -> nn.Module:
    """Turns every batch norm into a SyncBatchNorm2d in place; values and state_dict keys stay."""
    for module in network.modules():
        if type(module) in (nn.BatchNorm2d, BatchNorm2d):
            module.__class__ = SyncBatchNorm2d
    return network


def is_synchronized(norm: nn.Module) -> bool:
    """Whether `norm` currently computes its statistics over several processes."""
    return isinstance(norm, SyncBatchNorm2d) and norm.training and world_size() > 1


def merged_moments(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Moments over the values of all processes, by one all-gather.

    Args:
        mean, var: [C], of this process; the variance is biased.
        count: values per channel in this process.
    Returns:
        mean [C], biased variance [C] and number of all values, float64; bitwise the same in every process.
    """
    channels = len(mean)
    own = torch.cat([mean, var, mean.new_full((1,), count)])
    means, variances, counts = gathered(own).double().split([channels, channels, 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, var, total


class SyncBatchNorm2d(BatchNorm2d):
    """BatchNorm2d whose statistics in training mode are those of the images of all processes.

    All processes must run the layer equally often, each on at least one image; batch sizes may differ.
    """

    def forward(self, input: Tensor) -> Tensor:  # [B, C, h, w] -> the same
        if not is_synchronized(self):
            return super().forward(input)
        return self._synchronized(input)

    # A compiled graph cannot contain the collectives.
    @torch.compiler.disable
    def _synchronized(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        self.count_pass()
        y: Tensor = _Normalize.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
        )
        return y


def merge_statistics(
    mean: Tensor,
    invstd: Tensor,
    count: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over the values of all processes, by one all-gather.

    Args:
        mean: [C], of this process, float32 or float64.
        invstd: [C], 1 / sqrt(var + eps) of the biased variance of this process.
        count: values per channel in this process, at least 1.
        running_mean, running_var: [C], moved in place by `momentum` towards mean and unbiased variance of
            all values; or both None.
    Returns:
        mean [C] and invstd [C] of all values, bitwise the same in every process, and the counts of the
        processes [W] int32, on the device.
    """
    channels = len(mean)
    # The count is a kernel argument, not a copy from the host: a CUDA graph can capture it.
    own = torch.cat([mean, invstd, mean.new_full((1,), count)])
    all_of = gathered(own)
    means, invstds, counts = all_of.split([channels, channels, 1], dim=1)
    counts = counts.squeeze(1)
    # The first argument gives the dtype of the statistics if there are no running ones.
    mean, invstd = _ops(mean).batch_norm_gather_stats_with_counts(
        all_of, means, invstds, running_mean, running_var, momentum, eps, counts
    )
    return mean, invstd, counts.to(torch.int32)


def sum_for_backward(sum_dy: Tensor, sum_dy_xmu: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of dy [C] and of dy (x - mean) [C] over the values of all processes, by one all-reduce.

    The gradient of x is invstd * w * (dy - sum_dy / N - (x - mean) * invstd^2 * sum_dy_xmu / N), with N the
    number of all values.
    """
    first, second = summed(torch.cat([sum_dy, sum_dy_xmu])).split(len(sum_dy))
    return first, second


class _Normalize(torch.autograd.Function):
    """(x - mean) * invstd * weight + bias, with the statistics of all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        ops = _ops(x)
        x = x.contiguous(memory_format=memory_format_of(x))
        mean, invstd = ops.batch_norm_stats(x, eps)
        mean, invstd, counts = merge_statistics(
            mean, invstd, x.numel() // x.shape[1], running_mean, running_var, momentum, eps
        )
        ctx.save_for_backward(x, weight, mean, invstd, counts)
        y: Tensor = ops.batch_norm_elemt(x, weight, bias, mean, invstd, eps)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        ops = _ops(x)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # The fast channels_last kernels need x and grad in that format.
        grad = grad.contiguous(memory_format=memory_format_of(x))
        sum_dy, sum_dy_xmu, grad_weight, grad_bias = ops.batch_norm_backward_reduce(
            grad, x, mean, invstd, weight, wants_x, wants_weight, wants_bias
        )
        grad_x = None
        if wants_x:
            sum_dy, sum_dy_xmu = sum_for_backward(sum_dy, sum_dy_xmu)
            grad_x = ops.batch_norm_backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts)
        # Gradients of the parameters are of this process: DistributedDataParallel averages them.
        return (
            grad_x,
            grad_weight if wants_weight else None,
            grad_bias if wants_bias else None,
            *([None] * 4),
        )


def _ops(x: Tensor) -> ModuleType:
    return torch if x.is_cuda else batch_norm_ops
