"""The optimiser step: forward, backward, update, without a host synchronisation."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import BatchNorm2d
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from prcl_fast.config import Config
from prcl_fast.data.batches import Batch
from prcl_fast.device import autocast
from prcl_fast.engine.guard import GRADIENT, BufferSnapshot, Failure, FiniteGuard
from prcl_fast.engine.sgd import FusedSGD
from prcl_fast.losses import poly_lr
from prcl_fast.methods import Method, StepIndex
from prcl_fast.processes.collectives import start_sum, summed, world_size
from prcl_fast.step_parts import part

# PyTorch 2.13 renamed the option.
_BUFFER_SYNC = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class TrainStep:
    """Losses and gradients of some micro-batches, the optimiser's step, and the method's `after_step`.

    The iteration, the learning rates, the gradient scale and the sums of the losses are tensors on the
    device. A loss or gradient that is not finite never reaches the weights: the optimiser skips the step, and
    `failure` reports it. With `train.on_nonfinite: skip`, the batch statistics and prototypes are restored as
    well, so that training can go on.

    With several ranks, DistributedDataParallel averages the gradients, in the last of the micro-batches. The
    losses that a step returns are means over the ranks, so that all ranks see the same failures.

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
        self.optimizer = FusedSGD(groups, momentum=optim.momentum, weight_decay=optim.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.amp == "fp16")
        self._sums: LossSums | None = None
        self._guard: FiniteGuard | None = None
        self._gradient_norm = torch.zeros((), device=device)
        self._snapshot = BufferSnapshot(method) if config.train.on_nonfinite == "skip" else None
        self._losses: Callable[[Batch, StepIndex], dict[str, Tensor]] = method
        if world_size() > 1:
            no_sync_of_buffers: dict[str, Any] = {_BUFFER_SYNC: False}  # see _average_batch_statistics
            self._losses = DistributedDataParallel(
                method,
                gradient_as_bucket_view=True,
                # A warm-up leaves heads out. On the CPU, without this option, buckets are laid out anew after
                # the first step: sums over more than two ranks would then be rounded differently in a run
                # that was resumed there.
                find_unused_parameters=method.warmup > 0 or device.type == "cpu",
                **no_sync_of_buffers,
            )

    def __call__(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """One step over `train.accumulate` micro-batches; the named losses, averaged over them."""
        config = self.config
        step = StepIndex(self.iteration, config.train.iterations)
        decay = poly_lr(1.0, step.iteration, step.total, power=config.optim.power)
        for lr, base in zip(self._lr, self._base_lr, strict=True):
            lr.copy_(base * decay)
        if self._snapshot is not None:
            self._snapshot.take()
        means = self._accumulate(batches, step)
        with part("optimizer"):
            self._watch(means)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        if self._snapshot is not None and self._guard is not None:
            self._snapshot.restore_if(self._guard.bad)
        if world_size() > 1 and not config.train.sync_bn:
            _average_batch_statistics(self.method)
        self.method.after_step(step)
        self.iteration += 1
        return means

    def _accumulate(self, batches: Sequence[Batch], step: StepIndex) -> dict[str, Tensor]:
        """The gradients of the micro-batches' mean loss, and the means of the named losses."""
        sums: dict[str, Tensor] = {}
        for batch in batches:
            last = batch is batches[-1]
            with contextlib.ExitStack() as stack:
                if not last and isinstance(self._losses, DistributedDataParallel):
                    stack.enter_context(self._losses.no_sync())
                with autocast(self.device, self.config.train.amp):
                    losses = self._losses(batch, step)
                sums = {name: sums.get(name, 0) + value.detach().float() for name, value in losses.items()}
                if last:
                    # The all-reduce overlaps with the backward pass.
                    means = start_sum(torch.stack(list(sums.values())) / (len(batches) * world_size()))
                with part("backward"):
                    self.scaler.scale(losses["loss"] / len(batches)).backward()
        return dict(zip(sums, means().unbind(), strict=True))

    def _watch(self, means: dict[str, Tensor]) -> None:
        """Adds the step to the sums, and makes the optimiser skip it if it is not finite."""
        fp16 = self.scaler.is_enabled()
        values = torch.stack(list(means.values()))
        if self._guard is None or self._sums is None:
            self._sums = LossSums(tuple(means), self.device)
            self._guard = FiniteGuard((*means, GRADIENT), self.device)
        self._sums.add(values)
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        self._gradient_norm.copy_(
            get_total_norm([gradient for gradient in gradients if gradient is not None])
        )
        gradient = self._gradient_norm
        if fp16:
            # Scaled gradients overflow now and then: the scaler skips such steps by itself. With a scale
            # below 1, an overflow is a failure of the gradient, not of the scale.
            scale = self.scaler._scale
            assert scale is not None
            gradient = torch.where(scale < 1, gradient, 0.0)
        self._guard.watch(torch.cat([values, gradient[None]]), self.iteration)
        if not fp16:
            self.optimizer.found_inf = self._guard.bad  # type: ignore[attr-defined]

    def failure(self) -> Failure | None:
        """The failure since the last call, None if all was finite. Reads from the device."""
        return None if self._guard is None else self._guard.take()

    def take_record(self) -> dict[str, Any]:
        """Each loss averaged over the steps since the last call, the last learning rate and gradient norm.

        On CUDA also "peak_memory_mib", the largest memory allocated so far. Reads from the device.
        """
        if self._sums is None:
            return {}
        record: dict[str, Any] = self._sums.take()
        norm = float(self._gradient_norm) / self.scaler.get_scale()
        record |= {"lr": float(self._lr[0]), "gradient_norm": norm}
        if self.device.type == "cuda":
            record["peak_memory_mib"] = torch.cuda.max_memory_allocated(self.device) >> 20
        return record

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


def _average_batch_statistics(method: Method) -> None:
    """Averages running means and variances over the ranks, so that their networks stay equal."""
    buffers = [
        buffer
        for module in method.modules()
        if isinstance(module, BatchNorm2d) and module.training
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    mean = summed(torch.cat(buffers)) / world_size()
    torch._foreach_copy_(buffers, list(mean.split([len(buffer) for buffer in buffers])))


class LossSums:
    """Sums of named scalars over the steps in which all are finite, on the device."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self._names = names
        self._sum = torch.zeros(len(names), device=device)
        self._steps = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, values: Tensor) -> None:
        """The values [names] of a step."""
        finite = values.isfinite().all()
        self._sum += torch.where(finite, values, 0.0)
        self._steps += finite

    def take(self) -> dict[str, float]:
        """The means since the last call, nan after no step; resets the sums. Reads from the device."""
        means = (self._sum / self._steps).tolist()
        self._sum.zero_()
        self._steps.zero_()
        return dict(zip(self._names, means, strict=True))
