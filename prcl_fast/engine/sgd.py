"""Stochastic gradient descent with momentum, fused, on parameters in any memory format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from prcl_fast.memory_format import memory_format_of


class FusedSGD(torch.optim.SGD):
    """torch.optim.SGD with `fused=True`; its state and settings are the same.

    On a CPU, PyTorch's fused step copies what is not contiguous there and back. Here it sees a channels_last
    weight, its gradient and its momentum as the rows of numbers that they are in memory. Dampening, Nesterov
    momentum and `maximize` are not offered.

    Args:
        groups: parameter groups, each with its `lr`, a number or a scalar tensor.
        momentum, weight_decay: as in torch.optim.SGD.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, weight_decay: float) -> None:
        super().__init__(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step for the parameters that have a gradient."""
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            lists = [
                [_in_memory_order(parameter, parameter) for parameter in params],
                [_in_memory_order(parameter.grad, parameter) for parameter in params],
                [
                    _in_memory_order(self.state[parameter]["momentum_buffer"], parameter)
                    for parameter in params
                ],
            ]
            sgd(
                *lists,
                has_sparse_grad=False,
                fused=True,
                # GradScaler and the guard against losses that are not finite leave these here.
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )


def _in_memory_order(x: Tensor, parameter: Tensor) -> Tensor:
    """`x` with its dimensions in the order in which `parameter` lies in memory."""
    if parameter.dim() != 4 or memory_format_of(parameter) is torch.contiguous_format:
        return x
    return x.permute(0, 2, 3, 1)
