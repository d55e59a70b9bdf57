"""Advisory locks of cached files, for builders and users; a lock ends with its process."""

from __future__ import annotations

import atexit
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prcl_fast.errors import WriteError
from prcl_fast.files.writing import remove_leftovers

# For each file in use: the descriptor that holds a shared lock on it, and the process that opened it.
_in_use: dict[Path, tuple[int, int]] = {}


@contextmanager
def locked(path: Path, say: Callable[[str], None], *, shared: bool = False) -> Iterator[None]:
    """Holds a lock file, exclusively or shared; waits until it is free."""
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    descriptor = _acquired(path, mode | fcntl.LOCK_NB)
    if descriptor is None:
        say(f"data.cache: waiting for another process that holds {path}")
        descriptor = _acquired(path, mode)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)


def use_until_exit(path: Path) -> None:
    """Marks a file as used by this process; its last user removes it at exit. The caller holds its lock."""
    former = _in_use.pop(path, None)
    if former is not None:
        os.close(former[0])
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    _in_use[path] = descriptor, os.getpid()


def remove_unused(path: Path, *, wait: bool) -> None:
    """Removes a file, its lock and leftovers of a killed builder, unless another process uses the file.

    Args:
        wait: wait for its lock; otherwise a file whose lock is held stays.
    """
    lock = path.with_suffix(".lock")
    holder = _acquired(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    if holder is None:
        return
    try:
        if _is_used(path):
            return
        remove_leftovers(path.parent, path.name)
        for file in (path, lock):
            file.unlink(missing_ok=True)
    finally:
        os.close(holder)


def _is_used(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _acquired(path: Path, mode: int) -> int | None:
    """A descriptor that holds the lock; None if the lock is held and `mode` is non-blocking."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, mode)
            # The lock is removed with its file: a lock without a name excludes no process.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@atexit.register
def _end_use() -> None:
    for path, (descriptor, process) in list(_in_use.items()):
        if process == os.getpid():
            # Closing alone would leave the lock with worker processes that inherited the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
            with suppress(FileNotFoundError, WriteError):  # somebody has removed the whole folder
                remove_unused(path, wait=True)
