"""Meters of the parts of a training step: their time, their memory, and their names in a trace."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from prcl_fast.step_parts import PARTS


class PartTimer:
    """Milliseconds of each part of each step.

    On a CPU wall time of the host. On CUDA the time between two events of the stream, which includes the time
    in which the device waits for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: list[list[tuple[str, Any, Any]]] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Times a whole step."""
        own: list[tuple[str, Any, Any]] = []
        self._steps.append(own)
        start = self._now()
        yield
        own.append(("", start, self._now()))

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times a part of the step."""
        start = self._now()
        yield
        self._steps[-1].append((name, start, self._now()))

    def steps(self) -> list[dict[str, float]]:
        """For each step the milliseconds of its parts, in the order of PARTS, and of the rest, "other"."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found = []
        for marks in self._steps:
            sums: dict[str, float] = {}
            for name, start, end in marks:
                sums[name] = sums.get(name, 0.0) + self._between(start, end)
            whole = sums.pop("")
            parts = {name: sums[name] for name in PARTS if name in sums}
            # A part on its own stream overlaps with the others.
            found.append(parts | {"other": max(0.0, whole - sum(parts.values()))})
        return found

    def medians(self) -> dict[str, float]:
        """The median of each part over the steps."""
        steps = self.steps()
        return {name: statistics.median(step[name] for step in steps) for name in steps[0]}

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return 1e3 * float(end - start)
        return float(start.elapsed_time(end))


class PartMemory:
    """Peak memory in each part, of PyTorch's allocator on CUDA.

    On a CPU there is no such number: freed memory stays with the process for later tensors, so that its
    resident memory is near its peak in every part.

    Attributes:
        peaks: bytes by part; empty on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measures a part of the step."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self._device))


class PartRanges:
    """The names of the parts in a trace of PyTorch's profiler."""

    @staticmethod
    def part(name: str) -> contextlib.AbstractContextManager[None]:
        """Names a part of the step."""
        return torch.profiler.record_function(name)  # type: ignore[no-any-return]
