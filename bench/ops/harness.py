"""Time and memory of the candidates of a case.

Candidates take turns within each round, so that a slow moment of the machine affects all of them. One call
gives three times: forward, backward and both. On CUDA a call starts with a flushed L2, after a short spin
kernel that hides the host's launch time. Ops without a gradient are replayed from a graph.
"""

from __future__ import annotations

import signal
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from bench.machine import fits
from bench.ops.case import Candidate, Case, Outcome
from bench.ops.memory import Meter, tensor_bytes
from prcl_fast.ops import use_backend

COMPILE_SECONDS = 180  # limit of compilation
_SLOW_SECONDS = 5.0  # a first call that takes longer is measured without a warm-up
_BUDGET_SECONDS = 20.0  # of the timed calls of one candidate
_LEAST_ROUNDS = 2
_L2_BYTES = 256 << 20  # more than any GPU's L2
_SPIN_CYCLES = 500_000  # about 0.3 ms
_MESSAGE_LENGTH = 150

Mark = Callable[[], None]


class OutOfTimeError(Exception):
    """A call exceeded its time limit."""


@dataclass
class Measured:
    """Measurements of one candidate.

    Attributes:
        failure: why nothing was measured, or None.
        broken: the failure is an error, not a limit of this machine.
        outcome: of the first input set.
        peak, retained: see `bench.ops.memory`; None if the system does not report them.
        timing: wall, events or graph.
        times: by direction, milliseconds of each round.
    """

    failure: str | None = None
    broken: bool = False
    outcome: Outcome | None = None
    peak: int | None = None
    retained: int | None = None
    timing: str = ""
    seconds: float = 0.0
    times: dict[str, list[float]] = field(default_factory=dict)


def first_calls(case: Case, candidate: Candidate, device: str) -> Measured:
    """Compiles, warms up, and measures memory. A failure is part of the result and is not raised."""
    if candidate.reason is not None:
        return Measured(failure=candidate.reason)
    if not fits(candidate.needs, device):
        return Measured(failure=f"needs about {candidate.needs / 1e9:.0f} GB of memory")
    measured = Measured()
    meter = Meter(device)

    def call() -> None:
        meter.start()
        started = time.perf_counter()
        with _grad_mode(case), use_backend(candidate.backend):
            outputs = _outputs(candidate, case.inputs[0])
            meter.after_forward(tensor_bytes(outputs))
            gradients = _gradients(case, case.inputs[0], outputs)
            meter.after_backward(tensor_bytes(gradients))
        measured.seconds = time.perf_counter() - started
        measured.outcome = Outcome(tuple(_detached(outputs)), gradients)
        measured.peak, measured.retained = meter.peak, meter.retained

    try:
        with _at_most(COMPILE_SECONDS if candidate.compiled else None):
            call()
        if candidate.compiled or measured.seconds < _SLOW_SECONDS:
            measured.outcome = None
            call()
    except OutOfTimeError:
        return Measured(failure=f"not compiled after {COMPILE_SECONDS} s")
    except torch.OutOfMemoryError:
        return Measured(failure="out of GPU memory")
    except Exception as error:
        what = "cannot be compiled: " if candidate.compiled else ""
        message = next(iter(str(error).strip().splitlines()), "")
        failure = textwrap.shorten(f"{what}{type(error).__name__}: {message}", _MESSAGE_LENGTH)
        return Measured(failure=failure, broken=not candidate.compiled)
    return measured


def time_in_turns(case: Case, measured: Mapping[str, Measured], device: str, rounds: int) -> None:
    """Adds the times of the candidates that ran: `rounds` each, or fewer of slow candidates."""
    ready = {name: value for name, value in measured.items() if value.failure is None}
    timers = {name: _Timer(case, case.candidates[name], device) for name in ready}
    for turn in range(rounds):
        for name, value in ready.items():
            slow = turn >= max(_LEAST_ROUNDS, _BUDGET_SECONDS / max(value.seconds, 1e-6))
            if slow or value.failure is not None:
                continue
            value.timing = timers[name].timing
            try:
                times = timers[name](turn)
            except torch.OutOfMemoryError:
                # It fit alone, but does not beside the graphs of other candidates.
                value.failure, value.times = "out of GPU memory", {}
                continue
            for direction, one in times.items():
                value.times.setdefault(direction, []).append(one)


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile, interpolated linearly between neighbouring values."""
    return torch.tensor(values, dtype=torch.float64).quantile(percent / 100).item()


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """One call: wall time on the CPU, device time with a flushed L2 on CUDA."""
    return _marked(lambda mark: call(), device)[-1]


class _Timer:
    """Times single calls of one candidate."""

    def __init__(self, case: Case, candidate: Candidate, device: str) -> None:
        self._case, self._candidate, self._device = case, candidate, device
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self.timing = "events" if device == "cuda" else "wall"
        if device == "cuda" and not case.leaves and candidate.graph:
            try:
                self._graphs = [self._captured(inputs) for inputs in case.inputs]
                self.timing = "graph"
            except RuntimeError:  # it synchronises with the host, so calls are timed one by one
                self._graphs = []

    def __call__(self, turn: int) -> dict[str, float]:
        """Milliseconds by direction."""
        if self._graphs:
            graph = self._graphs[turn % len(self._graphs)]
            return {"forward": milliseconds(graph.replay, self._device)}
        inputs = self._case.inputs[turn % len(self._case.inputs)]

        def call(mark: Mark) -> None:
            outputs = _outputs(self._candidate, inputs)
            if self._case.leaves:
                mark()
                _gradients(self._case, inputs, outputs)

        with _grad_mode(self._case), use_backend(self._candidate.backend):
            times = _marked(call, self._device)
        if not self._case.leaves:
            return {"forward": times[0]}
        return {"forward": times[0], "backward": times[1] - times[0], "both": times[1]}

    def _captured(self, inputs: tuple[Any, ...]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), use_backend(self._candidate.backend):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                _outputs(self._candidate, inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                _outputs(self._candidate, inputs)
        return graph


def _outputs(candidate: Candidate, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    found = candidate.function(*inputs)
    return found if isinstance(found, tuple) else (found,)


def _gradients(case: Case, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    if not case.leaves:
        return ()
    leaves = [inputs[position] for position in case.leaves]
    return torch.autograd.grad(outputs[0], leaves, case.upstream)


def _detached(outputs: tuple[Any, ...]) -> Iterator[Any]:
    for value in outputs:
        yield value.detach() if isinstance(value, Tensor) else value


def _grad_mode(case: Case) -> torch.set_grad_enabled:
    return torch.set_grad_enabled(bool(case.leaves))


def _marked(run: Callable[[Mark], Any], device: str) -> list[float]:
    """Milliseconds from the start to each mark, and last to the end."""
    if device == "cpu":
        marks = [time.perf_counter()]
        run(lambda: marks.append(time.perf_counter()))
        marks.append(time.perf_counter())
        return [(mark - marks[0]) * 1e3 for mark in marks[1:]]
    events: list[torch.cuda.Event] = []

    def record() -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        events.append(event)

    torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda").zero_()
    torch.cuda._sleep(_SPIN_CYCLES)
    record()
    run(record)
    record()
    torch.cuda.synchronize()
    return [events[0].elapsed_time(event) for event in events[1:]]


@contextmanager
def _at_most(seconds: int | None) -> Iterator[None]:
    """Raises OutOfTimeError in the main thread after `seconds`; None is no limit."""
    if seconds is None:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
