"""Stop signals: the first one ends the run after its step, the second one immediately."""

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
_GRACE_S = 2.0  # for the main thread to end by itself


class StopRequest:
    """A request to stop the run, made to any of its ranks.

    Attributes:
        asked: this rank got a stop signal.
    """

    def __init__(self) -> None:
        self.asked = False
        self._pending: Callable[[], Tensor] | None = None

    def agreed(self) -> bool:
        """Whether to stop after this step; the answer is equal on all ranks, which all ask after each step.

        With several ranks it comes one step after the signal, because the all-reduce overlaps with a step.
        """
        if world_size() == 1:
            return self.asked
        former, self._pending = self._pending, start_sum(torch.tensor(float(self.asked)))
        return former is not None and bool(former() > 0)

    @contextlib.contextmanager
    def on_signals(self, say: Callable[[str], None]) -> Iterator[None]:
        """Handles SIGINT and SIGTERM within the block.

        The second signal raises KeyboardInterrupt. If the main thread waits in a library, for another rank or
        for the device, it cannot raise; the process then ends with status 1 two seconds later.
        """

        def stop(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            say("stopping after this step; a second signal ends the run immediately")

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
    count = 0
    while count < 2:
        received = numbers.recv(16)  # a byte for each signal, written before any Python code runs
        if not received:
            return
        count += sum(number in _STOPPING for number in received)
    if not done.wait(_GRACE_S):
        os._exit(1)
