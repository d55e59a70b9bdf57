"""Batch norm whose counters of batches a network advances all together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PassCounter:
    """Collects the counters of the layers that a forward pass uses, and adds 1 to all of them at its end.

    One addition stands in place of one for each layer, which on a GPU are over a hundred launches a step.
    Layers that are called outside of a pass count for themselves.

    Attributes:
        collecting: whether a pass has begun and not ended.
    """

    def __init__(self) -> None:
        self.collecting = False
        self._counters: list[Tensor] = []

    def begin(self) -> None:
        """A pass begins."""
        self.collecting = True

    def add(self, counter: Tensor) -> None:
        """A layer of this pass, by its `num_batches_tracked`: once a pass."""
        self._counters.append(counter)

    def end(self) -> None:
        """Counts the pass."""
        if self._counters:
            torch._foreach_add_(self._counters, 1)
        self.drop()

    def drop(self) -> None:
        """The pass failed: it does not count."""
        self._counters.clear()
        self.collecting = False


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, with the same state, which leaves counting to its network's `PassCounter`.

    Attributes:
        passes: None in a layer that belongs to no network.
    """

    passes: PassCounter | None = None

    def forward(self, input: Tensor) -> Tensor:  # [B, C, h, w] -> the same
        self._check_input_dim(input)
        if self.training:
            self.count_pass()
        assert self.momentum is not None  # no running means over all batches here
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            self.momentum,
            self.eps,
        )

    def count_pass(self) -> None:
        """Counts a batch in training mode; for whoever normalises in this layer's place, too."""
        if self.num_batches_tracked is None:
            return
        if self.passes is not None and self.passes.collecting:
            self.passes.add(self.num_batches_tracked)
        else:
            self.num_batches_tracked.add_(1)


def count_together(network: nn.Module) -> PassCounter:
    """A counter for all batch norms of `network`, which tells it where its forward passes begin and end."""
    counter = PassCounter()
    for module in network.modules():
        if isinstance(module, BatchNorm2d):
            module.passes = counter
    return counter
