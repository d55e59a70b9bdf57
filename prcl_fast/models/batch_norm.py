"""Batch norm whose batch counters advance together, once per forward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PassCounter:
    """Counter of a network's forward passes: adds 1 to `num_batches_tracked` of all layers used in a pass.

    One operation replaces one per layer, over a hundred GPU launches per step. A layer that is called outside
    a pass counts by itself.

    Attributes:
        collecting: whether a pass has begun and not ended.
    """

    def __init__(self) -> None:
        self.collecting = False
        self._counters: list[Tensor] = []

    def begin(self) -> None:
        """Begins a pass."""
        self.collecting = True

    def add(self, counter: Tensor) -> None:
        """Adds a layer's `num_batches_tracked`. Call at most once per layer and pass: each call adds 1."""
        self._counters.append(counter)

    def end(self) -> None:
        """Ends and counts the pass."""
        if self._counters:
            torch._foreach_add_(self._counters, 1)
        self.drop()

    def drop(self) -> None:
        """Ends a failed pass without counting it."""
        self._counters.clear()
        self.collecting = False


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with the same state, counted by its network's `PassCounter`.

    Attributes:
        passes: the counter; None outside a network.
    """

    passes: PassCounter | None = None

    def forward(self, input: Tensor) -> Tensor:  # [B, C, h, w] -> the same
        self._check_input_dim(input)
        if self.training:
            self.count_pass()
        assert self.momentum is not None  # cumulative averages are not used
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
        """Counts a batch in training mode; also called by ops that normalise in place of this layer."""
        if self.num_batches_tracked is None:
            return
        if self.passes is not None and self.passes.collecting:
            self.passes.add(self.num_batches_tracked)
        else:
            self.num_batches_tracked.add_(1)


def count_together(network: nn.Module) -> PassCounter:
    """A counter for all batch norms of `network`, whose forward must call its `begin` and `end`."""
    counter = PassCounter()
    for module in network.modules():
        if isinstance(module, BatchNorm2d):
            module.passes = counter
    return counter
