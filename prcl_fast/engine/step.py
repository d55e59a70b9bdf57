"""One optimiser step with all that it changes on the device: nothing in it makes the host wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prcl_fast.config import Config
from prcl_fast.data.batches import Batch
from prcl_fast.device import autocast
from prcl_fast.engine.guard import FiniteGuard
from prcl_fast.losses import poly_lr
from prcl_fast.methods import Method, Step
from prcl_fast.parts import part


class TrainStep:
    """Losses and gradients of some micro-batches, the optimiser's step and what the method does after it.

    The iteration, the learning rates, the gradient scale and the sums of the losses are tensors on the
    device. On a CPU, where there is nothing to wait for, a loss that is not finite stops the step before it
    reaches the weights.

    Attributes:
        iteration: int64 scalar, the number of steps done.
    """

    def __init__(self, method: Method, config: Config, device: torch.device) -> None:
        self.method, self.config, self.device = method, config, device
        self.iteration = torch.zeros((), dtype=torch.int64, device=device)
        groups = method.parameter_groups()
        self._base_lr = [float(group["lr"]) for group in groups]
        self._lr = [torch.zeros((), device=device) for _ in groups]
        for group, lr in zip(groups, self._lr, strict=True):
            group["lr"] = lr
        optim = config.optim
        self.optimizer = torch.optim.SGD(
            groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True
        )
        # The fused step leaves the first momentum unset where it skips for an infinite fp16 gradient.
        for group in groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.amp == "fp16")
        self._losses: LossSums | None = None

    def __call__(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """One step over `train.accumulate` micro-batches; the named losses, averaged over them.

        Raises:
            NonFiniteLossError: on a CPU, a loss was not finite.
        """
        config = self.config
        step = Step(self.iteration, config.train.iterations)
        decay = poly_lr(1.0, step.iteration, step.total, power=config.optim.power)
        for lr, base in zip(self._lr, self._base_lr, strict=True):
            lr.copy_(base * decay)
        sums: dict[str, Tensor] = {}
        for batch in batches:
            with autocast(self.device, config.train.amp):
                losses = self.method.losses(batch, step)
            with part("backward"):
                self.scaler.scale(losses["loss"] / len(batches)).backward()
            sums = {name: sums.get(name, 0) + value.detach().float() for name, value in losses.items()}
        means = {name: total / len(batches) for name, total in sums.items()}
        if self._losses is None:
            self._losses = LossSums(tuple(means), self.device)
        self._losses.add(means, self.iteration)
        if self.device.type == "cpu":
            self._losses.guard.check()
        with part("optimizer"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(step)
        self.iteration += 1
        return means

    def check_finite(self) -> None:
        """Raises NonFiniteLossError if a loss of any step was not finite. Reads from the device."""
        if self._losses is not None:
            self._losses.guard.check()

    def take_means(self) -> dict[str, float]:
        """Each loss averaged over the steps since the last call. Reads from the device."""
        return {} if self._losses is None else self._losses.take()

    def learning_rate(self) -> float:
        """Of the last step, in the first group. Reads from the device."""
        return float(self._lr[0])

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's and the gradient scale's state."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any], iteration: int) -> None:
        """Goes on from `iteration` with a `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        for group, lr in zip(self.optimizer.param_groups, self._lr, strict=True):
            group["lr"] = lr
        self.scaler.load_state_dict(state["scaler"])
        self.iteration.fill_(iteration)


class LossSums:
    """Sums of named scalars over steps, kept on their device, and watched for what is not finite."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self._names = names
        self._sum = torch.zeros(len(names), device=device)
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self.guard = FiniteGuard(names, device)

    def add(self, values: dict[str, Tensor], iteration: Tensor) -> None:
        """The values of step `iteration`."""
        row = torch.stack([values[name] for name in self._names])
        self.guard.watch(row, iteration)
        self._sum += row
        self._steps += 1

    def take(self) -> dict[str, float]:
        """The means since the last call; reads from the device and starts anew."""
        means = (self._sum / self._steps).tolist()
        self._sum.zero_()
        self._steps.zero_()
        return dict(zip(self._names, means, strict=True))
