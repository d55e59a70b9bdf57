"""Stochastic gradient descent with momentum, fused, on parameters in any memory format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from prcl_fast.memory_format import memory_format_of


class FusedSGD(torch.optim.SGD):
    """torch.optim.SGD with `fused=True`; its state and settings are the same.

    PyTorch's fused step on a CPU copies tensors that are not contiguous, and pairs wrong elements where a
    weight, its gradient and its momentum have different memory formats. Here it sees all three as contiguous
    rows in the weight's order. Dampening, Nesterov momentum and `maximize` are not supported.

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
            sgd(
                [_in_memory_order(parameter) for parameter in params],
                [_in_memory_order(_in_format_of(parameter.grad, parameter)) for parameter in params],
                [_in_memory_order(self._momentum(parameter)) for parameter in params],
                has_sparse_grad=False,
                fused=True,
                # Set by GradScaler and by TrainStep.
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )

    def _momentum(self, parameter: Tensor) -> Tensor:
        """The parameter's momentum, zeros at first, in the parameter's memory format."""
        state = self.state[parameter]
        found = state.get("momentum_buffer")
        state["momentum_buffer"] = (
            torch.zeros_like(parameter) if found is None else _in_format_of(found, parameter)
        )
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def _in_format_of(x: Tensor, parameter: Tensor) -> Tensor:
    """`x` in the memory format of `parameter`; `x` itself where it has that format."""
    if parameter.dim() != 4:
        return x.contiguous()
    return x.contiguous(memory_format=memory_format_of(parameter))


def _in_memory_order(x: Tensor) -> Tensor:
    """A contiguous view of `x`, its dimensions in the order of its strides."""
    if x.dim() != 4 or memory_format_of(x) is torch.contiguous_format:
        return x
    return x.permute(0, 2, 3, 1)
