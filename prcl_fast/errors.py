"""Exceptions that end a command with one line and without a traceback."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

# Of a machine that lacks room, open files, processes, or a disk that works.
_LIMITS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EMFILE, errno.ENFILE, errno.EAGAIN),
    *(errno.EIO, errno.EROFS, errno.ESTALE),
)


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


def fault_of_system(error: Exception) -> str | None:
    """One line about an error of the system that names a file, or tells of a limit of the machine.

    None for any other error: without its traceback nobody could find its origin.
    """
    if not isinstance(error, OSError) or (error.filename is None and error.errno not in _LIMITS):
        return None
    named = "" if error.filename is None else f"{error.filename}: "
    return f"{named}{error.strerror or error}"


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Puts the key of a configuration before the message of an InputError about its file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
