"""Stopping when asked to: one signal ends the run after its step, a second one at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prcl_fast.processes.collectives import start_sum, world_size

_STOPPING = (signal.SIGINT, signal.SIGTERM)
_GRACE = 2.0  # seconds for the main thread to end by itself


class StopRequest:
    """Whether any process of the run was asked to stop.

    Attributes:
        asked: whether this process was.
    """

    def __init__(self) -> None:
        self.asked = False
        self._pending: Callable[[], Tensor] | None = None

    def agreed(self) -> bool:
        """Whether to stop after this step, the same answer in all processes, which all ask after each step.

        With several of them, one learns of another's signal a step later: the exchange overlaps with a step.
        """
        if world_size() == 1:
            return self.asked
        former, self._pending = self._pending, start_sum(torch.tensor(float(self.asked)))
        return former is not None and bool(former() > 0)

    @contextlib.contextmanager
    def on_signals(self, say: Callable[[str], None]) -> Iterator[None]:
        """Listens for SIGINT and SIGTERM.

        The second one raises KeyboardInterrupt. Where the main thread cannot hear it, because it waits in a
        library for another process or for the device, the process ends with status 1 two seconds later.
        """

        def stop(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            say("stopping after this step; once more to end at once")

        read_end, write_end = socket.socketpair()
        write_end.setblocking(False)
        done = threading.Event()
        former_wakeup = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        former = {number: signal.signal(number, stop) for number in _STOPPING}
        threading.Thread(target=_end_after_the_second, args=(read_end, done), daemon=True).start()
        try:
            yield
        finally:
            done.set()
            for number, handler in former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(former_wakeup)
            write_end.close()


def _end_after_the_second(numbers: socket.socket, done: threading.Event) -> None:
    heard = 0
    while heard < 2:
        got = numbers.recv(16)  # a byte for each signal, written before any Python code runs
        if not got:
            return
        heard += sum(number in _STOPPING for number in got)
    if not done.wait(_GRACE):
        os._exit(1)
