"""Standard output and standard error of a command: any encoding, and no run ends because of them."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

BROKEN_PIPE = 128 + 13  # the shell's status for a program that SIGPIPE ended


class Stream:
    """A stream whose first error is kept, after which it takes everything and writes nothing.

    Attributes:
        failure: the error; None while the stream can be written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None
        if hasattr(stream, "reconfigure"):  # characters that the encoding lacks are shown by their numbers
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes `text`, and returns its length."""
        if self.failure is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Writes what is kept in memory."""
        if self.failure is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.failure = error
        # What the stream still holds goes nowhere, or its last flush would fail at the end of the process.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def standard_streams() -> Iterator[Stream | None]:
    """Puts a `Stream` in the place of standard output and standard error; yields that of the output.

    A closed stream is replaced by nothing at all: its number must not become that of a file.
    """
    _occupy_closed()
    former = sys.stdout, sys.stderr
    output, errors = (None if stream is None else Stream(stream) for stream in former)
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    try:
        yield output
    finally:
        for stream in (output, errors):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = former


def status_of(output: Stream | None, name: str) -> int:
    """The exit status of a command that has done its work, and one line where its output is lost."""
    if output is None or output.failure is None:
        return 0
    if output.failure.errno == errno.EPIPE:  # the reader, such as `head`, has what it wants
        return BROKEN_PIPE
    print(f"{name}: standard output: {output.failure.strerror}; the result is lost", file=sys.stderr)
    return 1


def _occupy_closed() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
