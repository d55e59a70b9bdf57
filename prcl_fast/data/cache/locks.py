"""Advisory locks of cached files, for builders and users; a lock ends with its process."""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prcl_fast.errors import WriteError
from prcl_fast.files.locking import acquire
from prcl_fast.files.writing import open_plain, remove_leftovers

_LOCK_NAME = re.compile(r"[0-9a-f]{24}\.lock")
_PRIVATE = 0o600
# For each file in use: the descriptor that holds a shared lock on it, and the process that opened it.
_in_use: dict[Path, tuple[int, int]] = {}
_removed_at_exit: set[Path] = set()


@contextmanager
def locked(path: Path, say: Callable[[str], None], *, shared: bool = False) -> Iterator[None]:
    """Holds a lock file, exclusively or shared; waits until it is free."""
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    descriptor = acquire(path, mode | fcntl.LOCK_NB, _PRIVATE)
    if descriptor is None:
        say(f"data.cache: waiting for another process that holds {path}")
        descriptor = acquire(path, mode, _PRIVATE)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)


def use_until_exit(path: Path, *, remove: bool) -> None:
    """Marks a file as used by this process, from now on. The caller holds its lock.

    Args:
        remove: its last user removes it at exit.
    """
    former = _in_use.pop(path, None)
    if former is not None:
        os.close(former[0])
    descriptor = open_plain(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.utime(descriptor)  # the time of its last use, for `others`
    _in_use[path] = descriptor, os.getpid()
    if remove:
        _removed_at_exit.add(path)


def others(path: Path, *, unused_s: float) -> list[Path]:
    """The cached files beside `path` that no process has opened for so many seconds."""
    found = []
    for lock in path.parent.iterdir():
        file = lock.with_suffix(path.suffix)
        if _LOCK_NAME.fullmatch(lock.name) and file != path:
            with suppress(FileNotFoundError):
                last = os.lstat(file if os.path.lexists(file) else lock).st_mtime
                if unused_s == 0 or time.time() - last > unused_s:
                    found.append(file)
    return found


def remove_unused(path: Path, *, wait: bool) -> bool:
    """Removes a file, its lock and leftovers of a killed builder, unless another process uses the file.

    Args:
        wait: wait for its lock; otherwise a file whose lock is held stays.

    Returns:
        Whether it was removed.
    """
    lock = path.with_suffix(".lock")
    holder = acquire(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB, _PRIVATE)
    if holder is None:
        return False
    try:
        if _is_used(path):
            return False
        remove_leftovers(path.parent, path.name)
        for file in (path, lock):
            file.unlink(missing_ok=True)
    finally:
        os.close(holder)
    return True


def _is_used(path: Path) -> bool:
    try:
        descriptor = open_plain(path, os.O_RDWR)  # an exclusive lock over NFS needs it
    except (FileNotFoundError, WriteError):  # no process uses what is no plain file
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@atexit.register
def _end_use() -> None:
    for path, (descriptor, process) in list(_in_use.items()):
        if process == os.getpid():
            # Closing alone would leave the lock with worker processes that inherited the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
            if path in _removed_at_exit:
                with suppress(FileNotFoundError, WriteError):  # somebody has removed the whole folder
                    remove_unused(path, wait=True)
