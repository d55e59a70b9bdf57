"""Who builds a cached file, who uses it, and when nobody does: advisory locks, which end with a process."""

from __future__ import annotations

import atexit
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Of each file in use: the descriptor that holds a shared lock on it, and the process that opened it.
_in_use: dict[Path, tuple[int, int]] = {}


@contextmanager
def locked(path: Path, say: Callable[[str], None], *, shared: bool = False) -> Iterator[None]:
    """Holds a lock file, alone or with others that share it, waiting if need be."""
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
    """Marks a file as used by this process; the last user's end removes it. The caller holds its lock."""
    former = _in_use.pop(path, None)
    if former is not None:
        os.close(former[0])
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    _in_use[path] = descriptor, os.getpid()


def remove_unused(path: Path, *, wait: bool) -> None:
    """Removes a file, its lock and what a killed builder left of it, unless another process uses it.

    Args:
        wait: wait for its lock; otherwise a file whose lock somebody holds stays.
    """
    lock = path.with_suffix(".lock")
    holder = _acquired(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    if holder is None:
        return
    try:
        if _is_used(path):
            return
        for file in (path, *path.parent.glob(f".{path.name}.*.tmp"), lock):
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
    """A descriptor that holds the lock, or None if it is taken and `mode` says not to wait."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, mode)
            # Who removes a file removes its lock: one that has lost its name keeps nobody out.
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
            # Closing alone would leave the lock to worker processes that have it too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
            with suppress(FileNotFoundError):  # somebody has removed the whole folder
                remove_unused(path, wait=True)
