"""What a run writes about itself: metrics.jsonl, TensorBoard, and progress on standard error."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from prcl_fast.files.writing import append, cannot_write, sync_file, write_whole

# What of an evaluation is shown, with how many decimals.
_SHOWN = {
    **{"miou": 2, "miou_student": 2},
    **{"variance_auroc": 3, "confidence_auroc": 3, "variance_moved": 4},
}


class RunLog:
    """The log of one run. A run that goes on at `start` drops the records that lie after it.

    Every record goes to metrics.jsonl (one JSON object a line) and its numbers to TensorBoard.

    Raises:
        RunError: one of these files cannot be written; so do `train`, `evaluation` and `flush`.
    """

    def __init__(self, folder: Path, *, start: int, total: int, console: Console) -> None:
        self.console = console
        self._path = folder / "metrics.jsonl"
        board = folder / "tensorboard"
        with _writing(self._path):
            _keep_until(self._path, start)
        with _writing(board):
            self._events = EventFile(board, start=start + 1)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=start, status="")
        self._noted = 0
        self._told = False

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
        self._bar.update(self._task, completed=iteration)

    def train(self, iteration: int, values: Mapping[str, Any]) -> None:
        """A record of training after `iteration` steps; its "note" is a sentence for the user."""
        self._write("train", iteration, values)
        shown = ", ".join(f"{key} {values[key]:.4g}" for key in values if key.startswith("loss"))
        self._bar.update(self._task, status=shown)
        if not self.console.is_terminal:
            self._say(f"iteration {iteration}: {shown}")
        # A batch may be at chance by chance: its sentence is shown when it comes twice running.
        note = values.get("note", "")
        if note:
            self._noted += 1
            if self._noted == 2:
                self._say(f"iteration {iteration}: {note}")
        else:
            self._noted = 0

    def evaluation(self, iteration: int, values: Mapping[str, Any]) -> None:
        """A record of an evaluation after `iteration` steps; its "note", a sentence, is shown once."""
        self._write("eval", iteration, values)
        shown = ", ".join(
            f"{key} {values[key]:.{places}f}" for key, places in _SHOWN.items() if key in values
        )
        self._say(f"iteration {iteration}: {shown}")
        if "note" in values and not self._told:
            self._told = True
            self._say(f"iteration {iteration}: {values['note']}")

    def flush(self) -> None:
        """Everything so far is on disk when this returns: a checkpoint may rely on it."""
        for path in (self._path, self._events.path):
            with _writing(path):
                sync_file(path)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def _write(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        record = {"kind": kind, "iteration": iteration} | {
            key: _plain(value) for key, value in values.items()
        }
        with _writing(self._path):
            append(self._path, json.dumps(record).encode() + b"\n")
        numbers = {f"{kind}/{name}": number for key in values for name, number in _numbers(key, values[key])}
        with _writing(self._events.path):
            self._events.add(iteration, numbers)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """An OSError in the block ends the run with one line that names `path`."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from None


def _keep_until(path: Path, iteration: int) -> None:
    """Drops the records after `iteration`, and lines that a killed writer or a failing disk has spoilt."""
    kept: list[bytes] = []
    if iteration > 0 and path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                if json.loads(line.decode())["iteration"] <= iteration:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # no UTF-8, no JSON, or no record
                continue
    write_whole(path, b"".join(line + b"\n" for line in kept))


def _plain(value: Any) -> Any:
    """JSON knows no NaN: it becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _numbers(key: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        return [pair for name, item in value.items() for pair in _numbers(f"{key}/{name}", item)]
    if isinstance(value, (int, float)) and math.isfinite(value):
        return [(key, float(value))]
    return []


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
