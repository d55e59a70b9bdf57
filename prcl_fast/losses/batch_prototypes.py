"""Local prototypes of a batch, all-reduced over the processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prcl_fast.ops import PrototypeStatistics
from prcl_fast.processes.collectives import start_sum, world_size

# A count is reduced as two float32 numbers: exact up to 2^36 pixels on 4096 processes.
_HALF = 4096


@dataclass(frozen=True)
class BatchPrototypes:
    """Statistics of the batch of all processes."""

    statistics: PrototypeStatistics
    hard: Tensor  # [C] int64, hard pixels
    class_factor: Tensor | None  # [C] float32: this process's hard pixels over the mean of all processes'
    moments: Tensor | None  # [C, M], the further sums


def start_summing(
    local: PrototypeStatistics, hard: Tensor, moments: Tensor | None = None
) -> Callable[[], BatchPrototypes]:
    """Starts one all-reduce of [C, 2D + 4 + M] numbers; no feature map is gathered.

    Args:
        local: this process's statistics of C classes in D dimensions.
        hard: [C] int64, this process's hard pixels.
        moments: [C, M] float32, further sums.
    Returns:
        A function that waits for the sums.
    """
    if world_size() == 1:
        return lambda: BatchPrototypes(local, hard, None, moments)
    dim = local.precision.shape[1]
    counts = torch.stack([local.count, hard], dim=1)
    columns = [local.precision, local.weighted_mean, counts % _HALF, counts // _HALF]
    further = 0 if moments is None else moments.shape[1]
    wait = start_sum(torch.cat(columns if moments is None else [*columns, moments], dim=1))

    def total() -> BatchPrototypes:
        precision, weighted_mean, low, high, sums = wait().split([dim, dim, 2, 2, further], dim=1)
        count, all_hard = (low.long() + _HALF * high.long()).unbind(1)
        class_factor = world_size() * hard / all_hard.clamp(min=1)
        statistics = PrototypeStatistics(precision, weighted_mean, count)
        return BatchPrototypes(statistics, all_hard, class_factor, sums if further else None)

    return total
