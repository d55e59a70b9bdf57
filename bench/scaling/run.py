"""Trains on processes of this machine and counts what crosses, or on one that stands for many of them.

Both are process groups of their own: being PyTorch's default group they see every collective, those that
DistributedDataParallel makes in C++ too. Who asked for it, the call stack says.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future

from bench.ops.harness import percentile
from bench.scaling.traffic import (
    COUNTS,
    GRADIENTS,
    MEANS,
    NETWORKS,
    NORM_BACKWARD,
    NORM_FORWARD,
    STATISTICS,
    STOP,
    Collective,
    Network,
    Shape,
    gathering,
    shape_of,
)
from bench.step.data import size_config
from prcl_fast.config import dump_config, parse_config
from prcl_fast.engine.trainer import Trainer
from prcl_fast.files.writing import write_text
from prcl_fast.losses import ProbabilisticContrast
from prcl_fast.step_parts import listening

WARMUP, STEPS, ROUNDS = 2, 5, 5  # steps, and turns of each network
_SMALL = "small"  # of bench.step
_HERE = ("train.device=cpu", "train.threads=1", "data.synthetic.unlabeled=16")
_MEASURED = ("train.batch_labeled=8", "train.batch_unlabeled=8")
# The public code's D, so that features weigh beside gradients; fewer anchors, so that steps are short.
_SIMULATED = ("model.dim=256", "method.anchors=64", "method.negatives=128")

SETTING_UP, USED, UNKNOWN = "setting up", "which parameters were used", "unknown"
# Of the frames from the innermost outwards, the first that is in one of these files.
_FILES = {
    "losses/contrast.py": STATISTICS,
    "losses/segmentation.py": COUNTS,
    "models/sync_batch_norm.py": NORM_BACKWARD,
    "ops/variance_head.py": NORM_BACKWARD,
    "engine/signals.py": STOP,
    "torch/autograd/graph.py": GRADIENTS,
    "torch/nn/parallel/distributed.py": SETTING_UP,
    "engine/step.py": MEANS,
}
_IN_CPP = (GRADIENTS, USED, SETTING_UP)  # who waits: DistributedDataParallel
_OVERSLEPT = 2e-4  # seconds that a sleep may be too long


def measure(count: int) -> dict[str, Any]:
    """Training steps of one global batch on so many processes of this machine, each with one thread."""
    with tempfile.TemporaryDirectory(prefix="prcl_scaling_") as folder:
        config = size_config(_SMALL, Path(folder), [*_HERE, *_MEASURED])
        report = _on_processes(_train, count, Path(folder), dump_config(config))
    images = config.train.batch_labeled + config.train.batch_unlabeled
    return {"processes": count, "images": images} | report


def measure_contrast(shape: Shape) -> dict[str, Any]:
    """What one forward and backward pass of the contrast sends, on 2 processes with a random map each."""
    size = (shape.classes, shape.dim, shape.height, shape.width)
    with tempfile.TemporaryDirectory(prefix="prcl_scaling_") as folder:
        sent = _on_processes(_contrast, 2, Path(folder), size)
    return {"processes": 2, "classes": size[0], "dim": size[1], "map": size[2:], "collectives": sent}


def simulate(count: int) -> list[dict[str, Any]]:
    """Steps of one real process that is told that it is one of `count`; 2 + 2 images for each of them."""
    ways = [(None, "ours"), *((network, what) for network in NETWORKS for what in ("ours", "gathering"))]
    if count == 1:
        ways = ways[:1]
    rows = [
        {"processes": count, "network": network and network.name, "what": what, "every_ms": []}
        for network, what in ways
    ]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prcl_scaling_")))
        batch = (f"train.batch_labeled={2 * count}", f"train.batch_unlabeled={2 * count}")
        config = size_config(_SMALL, folder, [*_HERE, *_SIMULATED, *batch])
        group = stack.enter_context(simulated(count))
        trainer = Trainer(config, Console(quiet=True))
        batches = stack.enter_context(contextlib.closing(trainer.batches()))
        instead = gathering(shape_of(config, len(trainer.source.classes)), (2, 2))
        for _ in range(WARMUP):
            trainer.step(batches)
        for _ in range(ROUNDS):
            for (network, what), row in zip(ways, rows, strict=True):
                group.network, group.instead = network, instead if what == "gathering" else None
                group.take()
                started = time.perf_counter()
                trainer.step(batches)
                trainer.stop.agreed()
                row["every_ms"].append(1e3 * (time.perf_counter() - started))
                passed, _ = group.take()
                if group.instead is not None:
                    passed = [one for one in passed if one.purpose != STATISTICS] + instead
                row["network_ms"] = 0.0 if network is None else 1e3 * network.seconds(passed, count)
    return [row | {"ms": percentile(row["every_ms"], 50)} for row in rows]


def _on_processes(work: Any, count: int, folder: Path, argument: Any) -> Any:
    """Runs `work` on so many processes; what the first of them reports."""
    mp.spawn(work, (count, folder, argument), nprocs=count)
    return json.loads((folder / "report.json").read_text())


def _report(rank: int, folder: Path, report: Mapping[str, Any]) -> None:
    if rank == 0:
        write_text(folder / "report.json", json.dumps(report))


def _train(rank: int, count: int, folder: Path, tree: Mapping[str, Any]) -> None:
    config = parse_config(tree, "bench.scaling")
    times: list[float] = []
    waits: list[dict[str, float]] = []
    calls: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(joined(rank, count, folder)) if count > 1 else None
        trainer = Trainer(config, Console(quiet=True))
        batches = stack.enter_context(contextlib.closing(trainer.batches()))
        for _ in range(WARMUP + STEPS):
            started = time.perf_counter()
            trainer.step(batches)
            trainer.stop.agreed()
            times.append(1e3 * (time.perf_counter() - started))
            if meter is not None:
                calls, waited = _taken(meter, count)
                waits.append(waited)
    times, waits = times[WARMUP:], waits[WARMUP:]
    waited_ms = {purpose: percentile([step.get(purpose, 0.0) for step in waits], 50) for purpose in calls}
    report = {
        "ms": percentile(times, 50),
        "ms_20": percentile(times, 20),
        "ms_80": percentile(times, 80),
        "every_ms": times,
        "collectives": calls,
        "waited_ms": waited_ms,
        "waited_share": sum(sum(step.values()) for step in waits) / sum(times),
    }
    _report(rank, folder, report)


def _contrast(rank: int, count: int, folder: Path, size: Sequence[int]) -> None:
    torch.set_num_threads(1)
    classes, dim, height, width = size
    torch.manual_seed(rank)
    mu = torch.randn(1, dim, height, width).contiguous(memory_format=torch.channels_last).requires_grad_()
    var = torch.rand_like(mu, requires_grad=False).mul_(0.9).add_(0.05)
    label = torch.randint(classes, (1, height, width))
    contrast = ProbabilisticContrast(classes, dim, tau=1.0)
    everywhere = torch.ones_like(label, dtype=torch.bool)
    with joined(rank, count, folder) as meter:
        loss = contrast(mu, var, label, everywhere, torch.rand(label.shape), torch.tensor([0, rank]))
        loss.backward()
        _report(rank, folder, _taken(meter, count)[0])


def _taken(meter: Meter, count: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Calls, bytes given and bytes sent by purpose since the last time, and milliseconds waited."""
    passed, waited = meter.take()
    sums: dict[str, Any] = {}
    for one in passed:
        entry = sums.setdefault(one.purpose, {"calls": 0, "gives": 0, "sends": 0.0})
        entry["calls"] += 1
        entry["gives"] += one.gives
        entry["sends"] += one.sent(count)
    return sums, {purpose: 1e3 * seconds for purpose, seconds in waited.items()}


class Meter(dist.ProcessGroup):
    """Counts the collectives of this process, and how long it waits for them.

    A process that came first waits for the others too. For gradients, which are waited for in C++, it is the
    time from when the last of them were given to the end of the backward pass.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._calls: list[Collective] = []
        self._waited: dict[str, float] = {}
        self._gradients_given: float | None = None

    def take(self) -> tuple[list[Collective], dict[str, float]]:
        """The collectives since the last time, and by purpose the seconds that were waited for them."""
        taken = self._calls, self._waited
        self._calls, self._waited = [], {}
        return taken

    def waited(self, purpose: str, seconds: float) -> None:
        """Notes it for the next `take`."""
        self._waited[purpose] = self._waited.get(purpose, 0.0) + seconds

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Hears of the parts of a step, `prcl_fast.step_parts`."""
        yield
        if name == "backward" and self._gradients_given is not None:
            self.waited(GRADIENTS, time.perf_counter() - self._gradients_given)
            self._gradients_given = None

    def getBackendName(self) -> str:  # noqa: N802, PyTorch's name
        """For DistributedDataParallel's own records."""
        return type(self).__name__

    def allreduce(self, tensors: list[Tensor], options: Any) -> dist.Work:
        """A sum, or what the options say."""
        return self._seen("allreduce", tensors[0], tensors, options)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> dist.Work:
        """What every process gives."""
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
    """Gloo, counted."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def broadcast(self, tensors: list[Tensor], options: Any) -> dist.Work:
        """Before the first step only, and not counted."""
        return self._gloo.broadcast(tensors, options)

    def _start(self, name: str, own: Collective, *arguments: Any) -> dist.Work:
        work: dist.Work = getattr(self._gloo, name)(*arguments)
        return work


class EqualProcesses(Meter):
    """As if `size` processes were there, all of which hold what this one holds.

    A result is there at once, and is handed over when the network would have brought it. Collectives pass
    one at a time.

    Attributes:
        network: None is one without delay. It may be changed between steps.
        instead: collectives that pass in the place of the prototype statistics.
    """

    def __init__(self, size: int) -> None:
        super().__init__(0, size)
        self.network: Network | None = None
        self.instead: Sequence[Collective] | None = None
        self._free_at = 0.0

    def broadcast(self, tensors: list[Tensor], options: Any) -> dist.Work:
        """Before the first step only: without delay."""
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
    """Done at the moment `arrival` of `time.perf_counter`."""

    def __init__(self, arrival: float, result: Any) -> None:
        super().__init__()
        self._arrival, self._result = arrival, result

    def wait(self, timeout: Any = None) -> bool:
        time.sleep(max(0.0, self._arrival - time.perf_counter() - _OVERSLEPT))
        while time.perf_counter() < self._arrival:
            pass
        return True

    def in_background(self) -> dist.Work:
        """The same with a future, which C++ waits for."""
        future: torch.futures.Future[Any] = torch.futures.Future()
        delay = self._arrival - time.perf_counter()
        if delay > 0:
            threading.Timer(delay, future.set_result, [self._result]).start()
        else:
            future.set_result(self._result)
        work: dist.Work = _create_work_from_future(future)
        return work


class _Timed(dist.Work):
    """Another work, with the time that is waited for it."""

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
    """This process among `world` of this machine, which meet in `folder`."""
    store = dist.FileStore(str(folder / "store"), world)
    made: list[CountedGloo] = []

    def make(own: dist.Store, number: int, size: int, timeout: timedelta) -> CountedGloo:
        made.append(CountedGloo(own, number, size, timeout))
        return made[0]

    with _default_group("counted", make, store, rank, world):
        yield made[0]


@contextlib.contextmanager
def simulated(world: int) -> Iterator[EqualProcesses]:
    """This process as the first of `world` equal ones."""
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
