"""Files that a killed process, a full disk or a power cut leaves whole: the former or the new ones."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prcl_fast.errors import RunError

# One name and not one a process: the next writer overwrites what a killed one has left.
TEMPORARY = ".tmp"


@contextlib.contextmanager
def staged(path: Path, data: Any) -> Iterator[None]:
    """Writes `data` (bytes-like) beside `path`; it becomes `path` when the block ends.

    When the block begins, the bytes are on the disk, under `path`'s name + ".tmp". The folder is not made.
    After an error `path` is as it was and the temporary file is gone. Raises OSError.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise
    sync_folder(path.parent)


def write_whole(path: Path, data: Any) -> None:
    """Writes `data` (bytes-like) so that `path` holds its former or its new bytes. Raises OSError."""
    with staged(path, data):
        pass


def append(path: Path, data: bytes) -> None:
    """Adds `data` to the end of `path`, without waiting for the disk. Raises OSError.

    The file is opened anew each time: a folder that was deleted meanwhile is noticed.
    """
    with path.open("ab", buffering=0) as file:
        while data:
            data = data[file.write(data) :]


def sync_file(path: Path) -> None:
    """Returns when what was written to `path` is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Returns when the names in `folder` are on the disk. Raises OSError."""
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems keep names only by themselves
            raise


def cannot_write(path: Path, error: OSError) -> RunError:
    """The end of a run that could not write `path`."""
    return RunError(f"{path}: cannot be written: {error.strerror or error}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`; what was written there becomes `path`, or is removed on an error.

    Parent folders are made. Safe between threads and processes: each has its own temporary name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all, with the line ends as given."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def user_cache() -> Path:
    """`prcl_fast` in $XDG_CACHE_HOME, or in ~/.cache; it may not be there yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "prcl_fast"
