"""Batch norm over the images of all processes.

On CUDA this is PyTorch's SyncBatchNorm. PyTorch has none for the CPU; the one here does the same there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prcl_fast.device import full_precision
from prcl_fast.distributed import summed, world_size


def synchronize_batch_norm(network: nn.Module, device: torch.device) -> nn.Module:
    """Puts a batch norm over all processes in the place of every BatchNorm2d, with its values.

    Args:
        network: changed in place; the names in its state_dict stay.
        device: where it runs: "cpu" or "cuda".
    """
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return converted
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SyncBatchNorm2d
    return network


def is_synchronized(norm: nn.Module) -> bool:
    """Whether a batch norm's statistics run over several processes now."""
    return isinstance(norm, (_SyncBatchNorm2d, nn.SyncBatchNorm)) and world_size() > 1


def merged_moments(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean [C] and biased variance [C] of `count` values, over those of all processes, and their number.

    Every process must call it; the results are float64, the same bits on each of them.
    """
    channels = len(mean)
    own = torch.cat([mean, var, mean.new_full((1,), count)])
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own)
    means, variances, counts = torch.stack(gathered).double().split([channels, channels, 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, var, total


class _SyncBatchNorm2d(nn.BatchNorm2d):
    """In training mode, mean and variance are those of all processes' images."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        y, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = var * (count / (count - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return y  # type: ignore[no-any-return]


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps), times weight, plus bias; mean and var over the processes' batches."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels, wide = x.shape[1], full_precision(x)
        work = wide.dtype
        local_var, local_mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        mean, var, count = merged_moments(local_mean, local_var, x.numel() // channels)
        inverse_std = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean.to(work), inverse_std.to(work), count)
        scale = inverse_std if weight is None else inverse_std * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        y = torch.addcmul(_per_channel(shift.to(work)), wide, _per_channel(scale.to(work))).to(x.dtype)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        channels, work = x.shape[1], mean.dtype
        grad_y = grad.to(work)
        normalized = (x.to(work) - _per_channel(mean)) * _per_channel(inverse_std)
        grad_bias = grad_y.sum((0, 2, 3))
        grad_weight = (grad_y * normalized).sum((0, 2, 3))
        total = summed(torch.cat([grad_bias, grad_weight])) / count.to(work)
        mean_grad, mean_product = total.split(channels)
        scale = inverse_std if weight is None else inverse_std * weight
        centred = grad_y - _per_channel(mean_grad) - normalized * _per_channel(mean_product)
        grad_x = (centred * _per_channel(scale)).to(x.dtype)
        if weight is None:
            return grad_x, None, None, None
        return grad_x, grad_weight, grad_bias, None


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]
