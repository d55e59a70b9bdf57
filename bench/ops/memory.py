"""What memory one call takes.

Peak is what is held at most beyond inputs, outputs and gradients; retained is what stays from forward to
backward beyond inputs and outputs. On CUDA PyTorch's allocator counts both. On Linux the kernel counts
resident pages: their high-water mark since a reset, and their number after freed pages were given back.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from prcl_fast.machine.memory import reset_resident_peak, resident_bytes, resident_peak


class Meter:
    """Call `start`, run forward, `after_forward`, run backward, `after_backward`.

    Attributes:
        peak, retained: bytes, None where the system does not tell.
    """

    def __init__(self, device: str) -> None:
        self._counter = _Allocator() if device == "cuda" else _ResidentPages()
        self.peak: int | None = None
        self.retained: int | None = None

    def start(self) -> None:
        gc.collect()
        self._before = self._counter.now()
        self._counter.reset_peak()

    def after_forward(self, output_bytes: int) -> None:
        self._kept = output_bytes
        self.peak = self._beyond(self._counter.peak(), self._kept)
        self.retained = self._beyond(self._counter.now(), self._kept)
        self._counter.reset_peak()

    def after_backward(self, gradient_bytes: int) -> None:
        peak = self._beyond(self._counter.peak(), self._kept + gradient_bytes)
        self.peak = None if peak is None or self.peak is None else max(self.peak, peak)

    def _beyond(self, value: int | None, known: int) -> int | None:
        return None if value is None or self._before is None else max(0, value - self._before - known)


def tensor_bytes(values: Iterable[Any]) -> int:
    """Of the tensors among them."""
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


class _Allocator:
    def reset_peak(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def now(self) -> int | None:
        return torch.cuda.memory_allocated()

    def peak(self) -> int | None:
        torch.cuda.synchronize()  # the time of the call is read after this
        return torch.cuda.max_memory_allocated()


class _ResidentPages:
    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._known = self._trim is not None

    def reset_peak(self) -> None:
        self._known &= reset_resident_peak()

    def now(self) -> int | None:
        if self._trim is not None:
            self._trim(0)  # else what was freed would still count
        return resident_bytes() if self._known else None

    def peak(self) -> int | None:
        return resident_peak() if self._known else None
