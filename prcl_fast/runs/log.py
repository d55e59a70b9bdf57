"""The log of a run: metrics.jsonl, TensorBoard, and progress on standard error."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from prcl_fast.console.plain import PlainConsole
from prcl_fast.errors import InputError, RunError
from prcl_fast.files.folders import make_subfolder
from prcl_fast.files.json_text import json_text
from prcl_fast.files.writing import append, sync_file, write_bytes
from prcl_fast.runs.metrics import METRICS, read_lines
from prcl_fast.runs.progress_bar import ProgressBar
from prcl_fast.runs.text_log import TextLog

# Values of an evaluation that are shown, and their decimals.
_SHOWN = {
    **{"miou": 2, "miou_student": 2},
    **{"variance_auroc": 3, "confidence_auroc": 3, "variance_moved": 4},
}


class RunLog:
    """The log of one run. A run that goes on from iteration `start` drops the later records.

    Every record goes to metrics.jsonl (one JSON object a line) and its numbers to TensorBoard; what the user
    is to read also goes to `console`, which may be the run's text log.

    Args:
        former_total: iterations of the whole run when its checkpoint was written; fewer than `total` in a run
            that was extended, which leaves a record of both.

    Raises:
        RunError: one of these files cannot be written. `train`, `evaluation` and `flush` raise it too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        total: int,
        console: PlainConsole | TextLog,
        former_total: int | None = None,
    ) -> None:
        self._lines = TextLog.of(console)
        self.console = console = self._lines.console
        self._path = folder / METRICS
        with _ends_run():
            _keep_until(self._path, start)
            self._events = EventFile(folder / "tensorboard", start=start + 1)
        self._bar = ProgressBar(console, start=start, total=total)
        self._notes_in_a_row = 0
        self._evaluation_noted = False
        if former_total is not None and former_total < total:
            self._write("extend", start, {"former_total": former_total, "total": total})

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, iteration: int) -> None:
        """Moves the progress bar to `iteration` finished steps."""
        self._bar.advance(iteration)

    def evaluating(self, done: int, total: int) -> None:
        """Shows that an evaluation has finished `done` of `total` images."""
        self._bar.evaluating(done, total)

    def train(self, iteration: int, values: Mapping[str, Any]) -> None:
        """A record of training after `iteration` steps; its "note" is a sentence for the user."""
        self._write("train", iteration, values)
        self._bar.record(values)
        line = f"iteration {iteration}: {self._bar.line(iteration, values)}"
        self._lines.say(line, shown=not self.console.is_terminal)
        # A single batch may be at chance level by accident: its note is shown when it comes twice in a row.
        note = values.get("note", "")
        self._notes_in_a_row = self._notes_in_a_row + 1 if note else 0
        if self._notes_in_a_row == 2:
            self._lines.say(f"iteration {iteration}: {note}")

    def evaluation(self, iteration: int, values: Mapping[str, Any]) -> None:
        """A record of an evaluation after `iteration` steps; its "note", a sentence, is shown once."""
        self._bar.evaluated()
        self._write("eval", iteration, values)
        shown = ", ".join(
            f"{key} {values[key]:.{places}f}" for key, places in _SHOWN.items() if key in values
        )
        self._lines.say(f"iteration {iteration}: {shown}")
        if "note" in values and not self._evaluation_noted:
            self._evaluation_noted = True
            self._lines.say(f"iteration {iteration}: {values['note']}")

    def flush(self) -> None:
        """Returns when all records are on the disk, so that no checkpoint is newer than they are."""
        with _ends_run():
            sync_file(self._path)
            sync_file(self._events.path)

    def _write(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        record = {"kind": kind, "iteration": iteration, **values}
        numbers = {f"{kind}/{name}": number for key in values for name, number in _numbers(key, values[key])}
        with _ends_run():
            append(self._path, json_text(record).encode() + b"\n")
            self._events.add(iteration, numbers)


class EventFile:
    """A new event file in `folder`; TensorBoard hides what earlier files there hold from `start` on.

    Raises:
        WriteError: the file cannot be written. Every method raises it too.
    """

    def __init__(self, folder: Path, *, start: int) -> None:
        make_subfolder(folder)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._records = RecordWriter(self)
        self._add(Event(step=start, file_version="brain.Event:2"))
        self._add(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def add(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Records the named numbers of `iteration`."""
        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        self._add(Event(step=iteration, summary=Summary(value=values)))

    def write(self, record: bytes) -> None:
        """Appends an encoded record; `RecordWriter` calls it."""
        append(self.path, record)

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


@contextlib.contextmanager
def _ends_run() -> Iterator[None]:
    """Makes an error of a file in the block a RunError: the configuration is not to blame."""
    try:
        yield
    except InputError as error:
        raise RunError(str(error)) from None


def _keep_until(path: Path, iteration: int) -> None:
    """Drops the records after `iteration`, and lines that a killed writer or a failing disk has damaged.

    An extension at `iteration` itself is recorded again, because no checkpoint has it yet.
    """
    lines = read_lines(path) if iteration > 0 and os.path.exists(path) else []
    records = [(line.text, line.record) for line in lines if line.record is not None]
    kept = [
        text for text, record in records if record["iteration"] + (record["kind"] == "extend") <= iteration
    ]
    write_bytes(path, b"".join(line + b"\n" for line in kept), durable=True)


def _numbers(key: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        return [pair for name, item in value.items() for pair in _numbers(f"{key}/{name}", item)]
    if isinstance(value, (int, float)) and math.isfinite(value):
        return [(key, float(value))]
    return []
