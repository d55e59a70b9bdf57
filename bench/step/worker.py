"""A candidate in its own process, with its own memory, that runs only in its turns.

The parent sends a number of steps and receives the milliseconds of one step. None ends the worker, which
answers with a Report. An error comes back as a Failure.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from bench.step.plain import PlainTraining
from bench.step.published import PublishedTraining
from bench.step.setup import LOSSES, Training
from prcl_fast.config import Config, dump_config, parse_config
from prcl_fast.console.plain import PlainConsole
from prcl_fast.data.sources import build_source
from prcl_fast.device import choose_device
from prcl_fast.engine.trainer import Trainer
from prcl_fast.machine.memory import resident_peak
from prcl_fast.planning.part_meter import PartTimer
from prcl_fast.planning.step_profile import traced
from prcl_fast.step_parts import listening

PATIENCE_SECONDS = 900  # for one answer; compilation is the longest
_MESSAGE_LENGTH = 200


class OurTraining:
    """The package's own trainer. Satisfies `bench.step.setup.Training`."""

    def __init__(self, config: Config) -> None:
        self.trainer = Trainer(config, PlainConsole(quiet=True))
        self.student = self.trainer.method.student
        self.batches = self.trainer.batches()

    def step(self) -> Mapping[str, torch.Tensor]:
        """`Trainer.step`."""
        return self.trainer.step(self.batches)

    def close(self) -> None:
        """Ends the data workers."""
        self.batches.close()


# With their changes of the configuration, in the order of their turns.
CANDIDATES: dict[str, tuple[Callable[[Config], Training], tuple[str, ...]]] = {
    "ours": (OurTraining, ()),
    "eager": (PlainTraining, ()),
    "ours-graph": (OurTraining, ("train.graph=true",)),
    "ours-shared16": (OurTraining, ("method.anchors_per_set=16",)),
    "ours-compile": (OurTraining, ("train.compile=true",)),
    "ours-graph-compile": (OurTraining, ("train.graph=true", "train.compile=true")),
    "compile": (PlainTraining, ("train.compile=true",)),
    "eager-bf16": (PlainTraining, ("train.amp=bf16",)),
    "published": (PublishedTraining, ("train.amp=off",)),
}


@dataclass(frozen=True)
class Report:
    """The report of a worker at its end.

    Attributes:
        parameters: of the student.
        losses: of the last step, by the names in LOSSES.
        peak_bytes: peak memory: resident memory of the process on the CPU, tensors on CUDA.
        parts_ms: median milliseconds of each part, from one more step after each turn; empty for a captured
            step.
        busy: of the package's candidates on CUDA, the fraction of the time in which a kernel ran.
        reserved_bytes: on CUDA, the peak of PyTorch's reserved memory.
        base_bytes: on the CPU, resident memory before the candidate was built.
        warmup_steps: made before the first turn.
    """

    parameters: int
    losses: dict[str, float]
    peak_bytes: int
    parts_ms: dict[str, float]
    busy: float | None = None
    reserved_bytes: int | None = None
    base_bytes: int | None = None
    warmup_steps: int = 0


@dataclass(frozen=True)
class Failure:
    """The reason why a candidate has no time."""

    reason: str


@dataclass
class Worker:
    """The parent's end of one worker."""

    process: SpawnProcess
    connection: Connection
    failure: str | None = None
    report: Report | None = None
    times: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, config: Config, warmup: int, seconds: float = math.inf) -> Worker:
        """Starts a candidate and waits until it has made `warmup` steps; `failure` tells why it could not.

        Args:
            seconds: limit of the warm-up, which ends with the step under way.
        """
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, name, dump_config(config), warmup, seconds)
        process = context.Process(target=_serve, args=arguments, name=f"bench.step {name}")
        process.start()
        theirs.close()
        worker = cls(process, ours)
        worker._answer()
        return worker

    def run(self, steps: int) -> None:
        """Adds the mean time of `steps` steps to `times`."""
        if self.failure is None and self._send(steps):
            milliseconds = self._answer()
            if milliseconds is not None:
                self.times.append(milliseconds)

    def finish(self) -> None:
        """Asks for the report and ends the process."""
        if self.failure is None and self._send(None):
            self.report = self._answer()
        self.stop()

    def stop(self) -> None:
        """Ends the process in any state."""
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _send(self, message: int | None) -> bool:
        try:
            self.connection.send(message)
        except OSError:
            self._answer()
            return False
        return True

    def _answer(self) -> Any:
        """The worker's next message; None, and `failure` is set, where it failed."""
        try:
            if not self.connection.poll(PATIENCE_SECONDS):
                self.failure = f"no answer for {PATIENCE_SECONDS} s"
                return None
            message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            self.failure = f"its process ended with status {self.process.exitcode}"
            return None
        if isinstance(message, Failure):
            self.failure = message.reason
            return None
        return message


def _serve(connection: Connection, name: str, tree: dict[str, Any], warmup: int, seconds: float) -> None:
    try:
        _work(connection, name, parse_config(tree, name), warmup, seconds)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the parent has ended
    except Exception as error:
        message = next(iter(str(error).strip().splitlines()), "")
        text = f"{type(error).__name__}: {message}"
        connection.send(Failure(textwrap.shorten(text, _MESSAGE_LENGTH)))


def _work(connection: Connection, name: str, config: Config, warmup: int, seconds: float) -> None:
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    if config.data.kind == "synthetic":
        _draw_all_images(config)
    base = resident_peak()
    training = CANDIDATES[name][0](config)
    losses: Mapping[str, torch.Tensor | float] = {}
    timer = None if config.train.graph else PartTimer(choose_device(config.train.device))
    try:
        warmed_up, end = 0, time.perf_counter() + seconds
        while warmed_up < warmup and time.perf_counter() < end:
            losses = training.step()
            _synchronize()
            warmed_up += 1
        connection.send("ready")
        while (steps := connection.recv()) is not None:
            _synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                losses = training.step()
            _synchronize()
            milliseconds = 1e3 * (time.perf_counter() - started) / steps
            if timer is not None:
                with listening(timer), timer.step():
                    training.step()
                _synchronize()
            connection.send(milliseconds)  # the next candidate's turn begins
        parts = {} if timer is None else timer.medians()
        report = _report(training, losses, parts, base)
        connection.send(replace(report, warmup_steps=warmed_up))
    finally:
        training.close()


def _draw_all_images(config: Config) -> None:
    """Generates the synthetic images in advance, so that no training step includes it."""
    source = build_source(config.data)
    for subset in ("labeled", "unlabeled"):
        for name in source.splits[subset].names:
            source.image(name)


def _report(
    training: Training, losses: Mapping[str, torch.Tensor | float], parts: dict[str, float], base: int
) -> Report:
    parameters = sum(parameter.numel() for parameter in training.student.parameters())
    values = {key: float(losses[key]) for key in LOSSES}
    if torch.cuda.is_initialized():
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        busy = None
        if isinstance(training, OurTraining):
            busy = traced(training.trainer, training.batches)
        return Report(parameters, values, allocated, parts, busy, reserved)
    peak = resident_peak()
    return Report(parameters, values, peak, parts, base_bytes=base)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
