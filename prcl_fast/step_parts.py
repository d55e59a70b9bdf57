"""Parts of a training step: named regions that a profiler can listen to, free of cost otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

PARTS = (
    "data wait",
    "weak augmentation",
    "teacher",
    "strong augmentation",
    "student",
    "losses",
    "contrast",
    "backward",
    "optimizer",
    "ema",
)  # in the order of a step


class Listener(Protocol):
    """Observer of every part that runs while `listening`; parts do not nest."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """A context around one run of part `name`, one of PARTS."""


_NOBODY = nullcontext()
_listener: Listener | None = None


def part(name: str) -> AbstractContextManager[None]:
    """A context around the code of part `name` of a step, one of PARTS."""
    return _NOBODY if _listener is None else _listener.part(name)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls `listener` for every part that runs inside the block."""
    global _listener
    former, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = former
