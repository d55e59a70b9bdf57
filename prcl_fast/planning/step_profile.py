"""Profile of a training step: time and memory of its parts, and the utilisation of the device."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prcl_fast.config import Config
from prcl_fast.console.plain import PlainConsole
from prcl_fast.data.batches import Batch
from prcl_fast.engine.graph import warm_up_steps
from prcl_fast.engine.trainer import Trainer
from prcl_fast.files.writing import replacing
from prcl_fast.machine.description import device_name
from prcl_fast.machine.memory import resident_peak
from prcl_fast.planning.decode_cost import DecodeCost, decode_cost
from prcl_fast.planning.part_meter import PartMemory, PartRanges, PartTimer
from prcl_fast.step_parts import listening

KIND = "prcl profile 1"
_TRACED = 3  # steps


@dataclass(frozen=True)
class Profile:
    """The profile of one configuration's step on one device.

    Attributes:
        step_ms: median milliseconds of a step; `step_ms_20`, `step_ms_80` its percentiles.
        parts_ms: median milliseconds of each part, in the order of a step, and of the rest, "other". With
            `train.graph` they are measured without the graph.
        peak_bytes: peak of the allocated memory in each part, on CUDA; empty on a CPU.
        resident_bytes: peak of the process's resident memory.
        busy: utilisation: on CUDA the fraction of the time in which a kernel ran, on a CPU the processor time
            of this process (without its data workers) over the time of all threads.
        decoding: time to decode the data set's images, without a cache.
        images: of one step, labeled and unlabeled together.
    """

    device: str
    threads: int
    torch: str
    images: int
    steps: int
    graph: bool
    step_ms: float
    step_ms_20: float
    step_ms_80: float
    parts_ms: dict[str, float]
    peak_bytes: dict[str, int]
    resident_bytes: int
    busy: float
    decoding: DecodeCost
    kind: str = KIND

    def plain(self) -> dict[str, Any]:
        """The profile as JSON."""
        return asdict(self)


def profile(
    config: Config,
    steps: int,
    *,
    trace: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Measures the first steps of a training, whose output is discarded.

    Args:
        steps: number of timed steps; as many more are timed part by part.
        trace: file for a trace of three steps, gzipped JSON for Perfetto and chrome://tracing.
        say: called with a line of progress.

    Raises:
        InputError: a file of the configuration is wrong, or `trace` cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="prcl_profile_") as folder:
        config = config.model_copy(update={"output": Path(folder) / "run"})
        trainer = Trainer(config, PlainConsole(quiet=True))
        with contextlib.closing(trainer.batches()) as batches:
            warm_up = warm_up_steps() + 2  # a graph is captured in the last but one
            say(f"{warm_up} steps of warm-up")
            for _ in range(warm_up):
                trainer.step(batches)
            say(f"{steps} steps as they train")
            whole, busy = _timed(trainer, batches, steps)
            if config.train.graph:
                trainer.run_eagerly()
            say(f"{steps} steps, part by part")
            timer = PartTimer(trainer.device)
            with listening(timer):
                for _ in range(steps):
                    with timer.step():
                        trainer.step(batches)
            memory = PartMemory(trainer.device)
            with listening(memory):
                trainer.step(batches)
            say(f"{_TRACED} steps with PyTorch's profiler")
            decoding = decode_cost(trainer.source)
            device_busy = traced(trainer, batches, trace)
    train = config.train
    percentiles = statistics.quantiles(whole, n=5, method="inclusive")
    return Profile(
        device=device_name(trainer.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        images=train.batch_labeled + (train.batch_unlabeled if config.method.needs_unlabeled else 0),
        steps=steps,
        graph=train.graph,
        step_ms=statistics.median(whole),
        step_ms_20=percentiles[0],
        step_ms_80=percentiles[-1],
        parts_ms=timer.medians(),
        peak_bytes=memory.peaks,
        resident_bytes=resident_peak(),
        busy=busy if device_busy is None else device_busy,
        decoding=decoding,
    )


def _timed(trainer: Trainer, batches: Iterator[Batch], steps: int) -> tuple[list[float], float]:
    """Milliseconds of each step, and processor time over the time of all threads."""
    timer = PartTimer(trainer.device)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        with timer.step():
            trainer.step(batches)
    found = [step["other"] for step in timer.steps()]
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return found, min(1.0, processor / wall / torch.get_num_threads())


def traced(trainer: Trainer, batches: Iterator[Batch], trace: Path | None = None) -> float | None:
    """Runs three steps under PyTorch's profiler and writes their trace to `trace`.

    Returns:
        The fraction of the time in which a kernel ran; None on a CPU.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    ranges = PartRanges()
    with torch.profiler.profile(activities=activities) as profiler, listening(ranges):
        for number in range(_TRACED):
            with torch.profiler.record_function(f"step {number}"):
                trainer.step(batches)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
    if trace is not None:
        _write_trace(profiler, trace)
    if trainer.device.type != "cuda":
        return None
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return busy_share(kernels)


def busy_share(intervals: list[tuple[float, float]]) -> float:
    """The fraction of the time from the first start to the last end that the intervals cover."""
    if not intervals:
        return 0.0
    busy, reached = 0.0, min(intervals)[0]
    first = reached
    for start, end in sorted(intervals):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / (reached - first)


def _write_trace(profiler: torch.profiler.profile, path: Path) -> None:
    with tempfile.NamedTemporaryFile(suffix=".json") as plain, replacing(path) as file:
        profiler.export_chrome_trace(plain.name)
        with open(plain.name, "rb") as source, gzip.open(file, "wb") as target:
            shutil.copyfileobj(source, target)
