"""Memory of one call.

Peak is the largest memory held beyond inputs, outputs and gradients. Retained is the memory kept from forward
to backward beyond inputs and outputs. On CUDA both come from PyTorch's allocator. On Linux they come from
resident memory: its peak since a reset, and its size after freed pages were returned.
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
        peak, retained: bytes; None if the system does not report them.
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
    """Bytes of the tensors among the values."""
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
            self._trim(0)  # otherwise freed pages would still count
        return resident_bytes() if self._known else None

    def peak(self) -> int | None:
        return resident_peak() if self._known else None
