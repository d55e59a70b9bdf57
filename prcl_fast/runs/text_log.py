"""The text log of a run, log.txt: every line for the user, with its time."""

from __future__ import annotations

import contextlib
import shlex
import sys
import traceback
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal

from prcl_fast.console.plain import PlainConsole
from prcl_fast.errors import InputError, RunError, WriteError
from prcl_fast.files.writing import append
from prcl_fast.processes.collectives import world_size

LOG = "log.txt"
Level = Literal["info", "error"]


class TextLog:
    """Lines for the user: printed on a console and, once `open` was called, appended to log.txt.

    Lines from before that are written by `open`. If the file can no longer be written, one line on the
    console says so, and the run goes on: its metrics and checkpoints end a run whose disk is full.
    """

    def __init__(self, console: PlainConsole) -> None:
        self.console = console
        self._path: Path | None = None
        self._waiting: list[bytes] | None = []  # None once they are written, or cannot be
        self._error = ""

    @classmethod
    def of(cls, console: PlainConsole | TextLog) -> TextLog:
        """`console` itself where it is a text log, else a new one that prints on it."""
        return console if isinstance(console, TextLog) else cls(console)

    def open(self, folder: Path) -> None:
        """Appends to folder/log.txt from now on; the command comes first. Raises WriteError."""
        path = folder / LOG
        command = _entry("info", f"command: {shlex.join(sys.argv)}")
        append(path, command + b"".join(self._waiting or ()))
        self._path, self._waiting = path, None

    def say(self, line: str, *, level: Level = "info", shown: bool = True) -> None:
        """Prints and records a line.

        Args:
            shown: False: only the file takes it.
        """
        if shown:
            self.console.print(line)
        entry = _entry(level, line)
        if self._path is None:
            if self._waiting is not None:
                self._waiting.append(entry)
            return
        try:
            append(self._path, entry)
        except WriteError as error:
            self._path = None
            self.say(f"{error}; the lines that follow are only printed", level="error")

    def error(self, message: str) -> None:
        """Records an error that is printed elsewhere, once if it is reported twice."""
        if message != self._error:
            self._error = message
            self.say(message, level="error", shown=False)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Records an exception that leaves the block.

        With several processes, an unexpected exception may be a consequence of another process's: there
        `error` takes what the watchdog reports.
        """
        try:
            yield
        except (InputError, RunError) as error:
            self.error(" ".join(str(error).split()))
            raise
        except KeyboardInterrupt:
            self.error("interrupted")
            raise
        except Exception as error:
            if world_size() > 1:
                raise
            self.error("".join(traceback.format_exception(error)).rstrip())
            raise


def _entry(level: Level, line: str) -> bytes:
    """The text of log.txt for a line that is said now."""
    time = datetime.now().astimezone().isoformat(timespec="seconds")
    return f"{time} {level}: {line}\n".encode(errors="backslashreplace")
