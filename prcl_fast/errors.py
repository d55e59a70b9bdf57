"""Exceptions that end a command with one line and without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class InputError(Exception):
    """A mistake in a configuration, a file or an argument.

    The message is one line that names the file, key or argument at fault. The command line prints it
    without a traceback and exits with status 2.
    """


class WriteError(InputError):
    """A file that cannot be written: the disk is full, access is denied, the name is taken by a folder, ...

    Attributes:
        errno: of the OSError behind it; None where there was none.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class RunError(RuntimeError):
    """A run cannot go on. The message is one line; the command line prints it and exits with status 1."""


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Puts the key of a configuration before the message of an InputError about its file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
