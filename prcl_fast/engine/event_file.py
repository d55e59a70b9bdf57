"""TensorBoard's event file of a run.

TensorBoard's own writer has a thread that meets a full disk long after the call, and prints a traceback.
A run has few records: they are written at once, and an error belongs to its record.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from prcl_fast.engine.durable import append


class EventFile:
    """A new event file in `folder`; TensorBoard hides what earlier files there hold from `start` on.

    Raises:
        OSError: the file cannot be written; so does every method.
    """

    def __init__(self, folder: Path, *, start: int) -> None:
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        self.path = (
            folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        )
        self._records = RecordWriter(self)
        self._add(Event(step=start, file_version="brain.Event:2"))
        self._add(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def add(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Records the named numbers of `iteration`."""
        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        self._add(Event(step=iteration, summary=Summary(value=values)))

    def write(self, record: bytes) -> None:
        """Where the encoded records go."""
        append(self.path, record)

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
