"""Estimated memory of a training step, without allocating it.

The method's forward and backward pass runs on fake tensors, which have shapes and types but no values. Every
storage that it makes is counted while it lives. Not counted: allocations inside an operation (workspaces of
convolutions) and fragmentation of the allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prcl_fast.config import Config
from prcl_fast.device import autocast
from prcl_fast.methods import Method, StepIndex, build_method
from prcl_fast.planning.step_timer import random_batch


@dataclass(frozen=True)
class StateBytes:
    """Memory that is held during the whole training, exact."""

    student: int  # parameters and buffers
    teacher: int  # the same of the teacher, or of a second student; 0 without one
    prototypes: int  # and all other state of the method
    momentum: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.student + self.teacher + self.prototypes + self.momentum


@dataclass(frozen=True)
class PassBytes:
    """Memory of one forward and backward pass over a micro-batch, beyond the states."""

    labeled: int  # images
    unlabeled: int
    saved: int  # by autograd, from the forward pass for the backward pass
    peak: int  # images, saved tensors, gradients and temporaries together


class MemoryEstimator:
    """Runs a configuration's method on fake tensors.

    Args:
        config: of the run.
        device: the simulated device; nothing is allocated on it.
    """

    def __init__(self, config: Config, num_classes: int, device: torch.device) -> None:
        self.config, self.num_classes, self.device = config, num_classes, device
        with torch.device("meta"):  # the teacher is a deep copy, which fake tensors do not support
            method = build_method(config, num_classes)
            method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            self.method: Method = method
            for module in method.modules():  # a module that two networks share comes once
                module.to_empty(device=device, recurse=False)
        self.method.train()
        self._passes: dict[tuple[int, int, bool], PassBytes] = {}

    def states(self) -> StateBytes:
        """Student, teacher, prototypes and momentum."""
        method = self.method
        student = tensor_bytes(_state(method.student))
        # Tensors that two networks share count as the student's.
        networks = [method.student, *method.networks().values()]
        teacher = tensor_bytes(tensor for network in networks for tensor in _state(network)) - student
        learned = [parameter for group in method.parameter_groups() for parameter in group["params"]]
        momentum = tensor_bytes(learned) if self.config.optim.momentum else 0
        return StateBytes(student, teacher, tensor_bytes(_state(method)) - student - teacher, momentum)

    def gradients(self) -> int:
        """Bytes of all gradients together."""
        return tensor_bytes(parameter for parameter in self.method.parameters() if parameter.requires_grad)

    def one_pass(self, labeled: int, unlabeled: int, *, accumulates: bool) -> PassBytes:
        """A micro-batch's pass after the first steps; with `accumulates` it adds to existing gradients."""
        key = (labeled, unlabeled, accumulates)
        if key not in self._passes:
            self._passes[key] = self._run(*key)
        return self._passes[key]

    def _run(self, labeled: int, unlabeled: int, accumulates: bool) -> PassBytes:
        config, method = self.config, self.method
        with self._fake, LiveBytes(_state(method)) as live:
            iteration = torch.zeros((), dtype=torch.int64, device=self.device)
            step = StepIndex(iteration, config.train.iterations)
            # Twice, because a pass begins with the state that the one before leaves: accumulated gradients,
            # and representations that a method keeps for its log.
            for _ in range(2):
                batch = random_batch(config, self.num_classes, labeled, unlabeled, self.device)
                with count_saved(_state(method)) as saved, autocast(self.device, config.train.amp):
                    loss = method.losses(batch, step)["loss"]
                loss.backward()
                if not accumulates:
                    method.zero_grad(set_to_none=True)
                del batch, loss
        method.zero_grad(set_to_none=True)
        return PassBytes(labeled, unlabeled, saved(), live.peak)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages below the tensors, each counted once."""
    return sum({_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@contextmanager
def count_saved(apart_from: Sequence[Tensor]) -> Iterator[Callable[[], int]]:
    """Counts the tensors that autograd saves inside; yields a function that returns their bytes so far.

    Args:
        apart_from: tensors whose storages do not count: parameters and buffers.
    """
    own = {_key(tensor) for tensor in apart_from}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in own:
            sizes[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make inside it.

    Args:
        known: tensors whose storages existed before and do not count.

    Attributes:
        now, peak: bytes of the storages alive, and their peak.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages = {_key(tensor) for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and _key(value) not in self._storages:
                self._born(value)
        return result

    def _born(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        size = storage.nbytes()
        self._storages.add(key)
        weakref.finalize(storage, self._freed, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size


def _state(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
