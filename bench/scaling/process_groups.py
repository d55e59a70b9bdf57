"""Process groups that count collectives: gloo between real ranks, or one real rank among simulated ones.

As PyTorch's default group they see every collective, those that DistributedDataParallel makes in C++ too. The
purpose of each is inferred from the call stack.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future

from bench.scaling.traffic import (
    COUNTS,
    GRADIENTS,
    MEANS,
    NORM_BACKWARD,
    NORM_FORWARD,
    STATISTICS,
    STOP,
    Collective,
    Network,
)
from prcl_fast.step_parts import listening

SETTING_UP, USED, UNKNOWN = "setting up", "which parameters were used", "unknown"
# The innermost stack frame in one of these files gives the purpose.
_FILES = {
    "losses/contrast.py": STATISTICS,
    "losses/segmentation.py": COUNTS,
    "models/sync_batch_norm.py": NORM_BACKWARD,
    "ops/variance_head.py": NORM_BACKWARD,
    "processes/signals.py": STOP,
    "torch/autograd/graph.py": GRADIENTS,
    "torch/nn/parallel/distributed.py": SETTING_UP,
    "engine/step.py": MEANS,
}
_IN_CPP = (GRADIENTS, USED, SETTING_UP)  # DistributedDataParallel waits for them in C++
_OVERSLEPT = 2e-4  # seconds by which a sleep may be too long


class Meter(dist.ProcessGroup):
    """Counts the collectives of this process and its waiting time.

    Waiting includes the time until the slowest process arrives. For gradients, for which C++ waits, it is the
    time from the last given bucket to the end of the backward pass.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._calls: list[Collective] = []
        self._waited: dict[str, float] = {}
        self._gradients_given: float | None = None

    def take(self) -> tuple[list[Collective], dict[str, float]]:
        """The collectives since the last call, and by purpose the seconds waited for them."""
        taken = self._calls, self._waited
        self._calls, self._waited = [], {}
        return taken

    def waited(self, purpose: str, seconds: float) -> None:
        """Adds waiting time for the next `take`."""
        self._waited[purpose] = self._waited.get(purpose, 0.0) + seconds

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Listens to the parts of a step, see `prcl_fast.step_parts`."""
        yield
        if name == "backward" and self._gradients_given is not None:
            self.waited(GRADIENTS, time.perf_counter() - self._gradients_given)
            self._gradients_given = None

    def getBackendName(self) -> str:  # noqa: N802, PyTorch's name
        """The name in DistributedDataParallel's records."""
        return type(self).__name__

    def allreduce(self, tensors: list[Tensor], options: Any) -> dist.Work:
        """Counts an all-reduce."""
        return self._seen("allreduce", tensors[0], tensors, options)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> dist.Work:
        """Counts an all-gather."""
        return self._seen("allgather", inputs[0], outputs, inputs, options)

    def _seen(self, name: str, given: Tensor, *arguments: Any) -> dist.Work:
        gathers = name == "allgather"
        purpose = _purpose(gathers)
        if purpose == GRADIENTS and not given.is_floating_point():
            purpose = USED
        own = Collective(purpose, given.numel() * given.element_size(), gathers)
        self._calls.append(own)
        work = self._start(name, own, *arguments)
        if purpose == GRADIENTS:
            self._gradients_given = time.perf_counter()
        return work if purpose in _IN_CPP else _Timed(work, self, purpose)

    def _start(self, name: str, own: Collective, *arguments: Any) -> dist.Work:
        raise NotImplementedError


class CountedGloo(Meter):
    """Gloo between real processes."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def broadcast(self, tensors: list[Tensor], options: Any) -> dist.Work:
        """Not counted: occurs only before the first step."""
        return self._gloo.broadcast(tensors, options)

    def _start(self, name: str, own: Collective, *arguments: Any) -> dist.Work:
        work: dist.Work = getattr(self._gloo, name)(*arguments)
        return work


class EqualProcesses(Meter):
    """Simulates `size` processes with identical data.

    A result is computed immediately and delivered when the network would have delivered it. Collectives pass
    one at a time.

    Attributes:
        network: None has no delay. It may be changed between steps.
        instead: collectives that replace the prototype statistics.
    """

    def __init__(self, size: int) -> None:
        super().__init__(0, size)
        self.network: Network | None = None
        self.instead: Sequence[Collective] | None = None
        self._free_at = 0.0

    def broadcast(self, tensors: list[Tensor], options: Any) -> dist.Work:
        """Without delay: occurs only before the first step."""
        return _Arriving(0.0, tensors).in_background()

    def _start(self, name: str, own: Collective, *arguments: Any) -> dist.Work:
        if name == "allgather":
            (outputs,), (given,), _ = arguments
            torch._foreach_copy_(outputs, [given] * len(outputs))
        elif arguments[1].reduceOp == dist.ReduceOp.SUM:
            arguments[0][0].mul_(self.size())
        arriving = _Arriving(self._arrival(own), arguments[0])
        return arriving.in_background() if own.purpose in _IN_CPP else arriving

    def _arrival(self, own: Collective) -> float:
        if self.network is None:
            return 0.0
        replaced = own.purpose == STATISTICS and self.instead is not None
        passing = self.instead if replaced else [own]
        assert passing is not None
        begins = max(time.perf_counter(), self._free_at)
        self._free_at = begins + self.network.seconds(passing, self.size())
        return self._free_at


class _Arriving(dist.Work):
    """Work that is done at the time `arrival` of `time.perf_counter`."""

    def __init__(self, arrival: float, result: Any) -> None:
        super().__init__()
        self._arrival, self._result = arrival, result

    def wait(self, timeout: Any = None) -> bool:
        time.sleep(max(0.0, self._arrival - time.perf_counter() - _OVERSLEPT))
        while time.perf_counter() < self._arrival:
            pass
        return True

    def in_background(self) -> dist.Work:
        """The same work as a future, for which C++ can wait."""
        future: torch.futures.Future[Any] = torch.futures.Future()
        delay = self._arrival - time.perf_counter()
        if delay > 0:
            threading.Timer(delay, future.set_result, [self._result]).start()
        else:
            future.set_result(self._result)
        work: dist.Work = _create_work_from_future(future)
        return work


class _Timed(dist.Work):
    """Wraps a work and records the waiting time."""

    def __init__(self, work: dist.Work, meter: Meter, purpose: str) -> None:
        super().__init__()
        self._work, self._meter, self._purpose = work, meter, purpose

    def wait(self, timeout: Any = None) -> bool:
        started = time.perf_counter()
        self._work.wait()
        self._meter.waited(self._purpose, time.perf_counter() - started)
        return True


@contextlib.contextmanager
def joined(rank: int, world: int, folder: Path) -> Iterator[CountedGloo]:
    """Joins `world` processes of this machine, whose rendezvous is in `folder`."""
    store = dist.FileStore(str(folder / "store"), world)
    made: list[CountedGloo] = []

    def make(own: dist.Store, number: int, size: int, timeout: timedelta) -> CountedGloo:
        made.append(CountedGloo(own, number, size, timeout))
        return made[0]

    with _default_group("counted", make, store, rank, world):
        yield made[0]


@contextlib.contextmanager
def simulated(world: int) -> Iterator[EqualProcesses]:
    """Makes this process rank 0 of `world` simulated ones."""
    made = EqualProcesses(world)
    with _default_group("simulated", lambda *_: made, dist.HashStore(), 0, world):
        yield made


@contextlib.contextmanager
def _default_group(name: str, make: Any, store: dist.Store, rank: int, world: int) -> Iterator[None]:
    if name in dist.Backend.backend_list:
        dist.Backend.backend_list.remove(name)
    dist.Backend.register_backend(name, make, devices=["cpu"])
    dist.init_process_group(name, store=store, rank=rank, world_size=world)
    group = dist.group.WORLD
    assert isinstance(group, Meter)
    try:
        with listening(group):
            yield
    finally:
        dist.destroy_process_group()


def _purpose(gathers: bool) -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        for ending, purpose in _FILES.items():
            if frame.f_code.co_filename.endswith(ending):
                return NORM_FORWARD if purpose == NORM_BACKWARD and gathers else purpose
        frame = frame.f_back
    return UNKNOWN
