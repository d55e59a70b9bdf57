"""Batch norm over the images of all processes, on CUDA and on the CPU.

A layer takes one all-gather of [2C + 1] numbers in its forward and one all-reduce of [2C] in its backward
pass. How many values each process has is known from shapes alone, so that the host reads nothing and a CUDA
graph can hold the layer.

A layer that computes batch statistics in a pass of its own, as the probability head does, asks
`is_synchronized` and merges them by `merged_moments`.
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
    """Turns every batch norm into a SyncBatchNorm2d, in place; values and the state_dict's names stay."""
    for module in network.modules():
        if type(module) in (nn.BatchNorm2d, BatchNorm2d):
            module.__class__ = SyncBatchNorm2d
    return network


def is_synchronized(norm: nn.Module) -> bool:
    """Whether `norm`, as it is now, takes its statistics over several processes."""
    return isinstance(norm, SyncBatchNorm2d) and norm.training and world_size() > 1


def merged_moments(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of all processes' values from those of this one's, by one all-gather.

    Args:
        mean, var: [C] of this process's values, the variance biased.
        count: how many values a channel has here.
    Returns:
        mean [C] and biased variance [C] of all values and their number, float64, the same bits in every
        process.
    """
    channels = len(mean)
    own = torch.cat([mean, var, mean.new_full((1,), count)])
    means, variances, counts = gathered(own).double().split([channels, channels, 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, var, total


class SyncBatchNorm2d(BatchNorm2d):
    """In training mode, mean and variance are those of all processes' images; else as BatchNorm2d.

    Every process must run the layer as often, each on at least one image; their numbers may differ.
    """

    def forward(self, input: Tensor) -> Tensor:  # [B, C, h, w] -> the same
        if not is_synchronized(self):
            return super().forward(input)
        return self._synchronized(input)

    # A compiled network leaves its graph here: it cannot hold the collectives.
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
    """The statistics of all processes' values from those of this one's, by one all-gather.

    Args:
        mean: [C] of this process's values, float32, or float64.
        invstd: [C], 1 / sqrt(var + eps) of their biased variance.
        count: how many values a channel has here; not 0.
        running_mean, running_var: [C], moved in place by `momentum` towards the mean and the unbiased
            variance of all values; or both None.
    Returns:
        mean [C] and invstd [C] of all values, the same bits in every process, and each process's count
        [W] int32, on the device.
    """
    channels = len(mean)
    # A number given to a kernel, not copied: a graph can hold it.
    own = torch.cat([mean, invstd, mean.new_full((1,), count)])
    all_of = gathered(own)
    means, invstds, counts = all_of.split([channels, channels, 1], dim=1)
    counts = counts.squeeze(1)
    # The first argument says which type the statistics have where there are no running ones.
    mean, invstd = _ops(mean).batch_norm_gather_stats_with_counts(
        all_of, means, invstds, running_mean, running_var, momentum, eps, counts
    )
    return mean, invstd, counts.to(torch.int32)


def sum_for_backward(sum_dy: Tensor, sum_dy_xmu: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over all processes' values of dy [C] and of dy (x - mean) [C], by one all-reduce.

    The gradient of x is invstd * w * (dy - sum_dy / N - (x - mean) * invstd^2 * sum_dy_xmu / N), with N the
    sum of the processes' counts.
    """
    first, second = summed(torch.cat([sum_dy, sum_dy_xmu])).split(len(sum_dy))
    return first, second


class _Normalize(torch.autograd.Function):
    """(x - mean) * invstd, times weight, plus bias, with the statistics of all processes."""

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
        # The fast kernels for channels_last need both in that format.
        grad = grad.contiguous(memory_format=memory_format_of(x))
        sum_dy, sum_dy_xmu, grad_weight, grad_bias = ops.batch_norm_backward_reduce(
            grad, x, mean, invstd, weight, wants_x, wants_weight, wants_bias
        )
        grad_x = None
        if wants_x:
            sum_dy, sum_dy_xmu = sum_for_backward(sum_dy, sum_dy_xmu)
            grad_x = ops.batch_norm_backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts)
        # The parameters' gradients stay this process's: DistributedDataParallel averages them.
        return (
            grad_x,
            grad_weight if wants_weight else None,
            grad_bias if wants_bias else None,
            *([None] * 4),
        )


def _ops(x: Tensor) -> ModuleType:
    return torch if x.is_cuda else batch_norm_ops
