"""The lock of an output folder: one process writes there, and a second one is told which.

The lock is flock on the file .prcl.lock in the folder. The system releases it when the process ends, however
it ends. The file names its holder and goes with the lock; after a crash it stays, and locks nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from prcl_fast.errors import InputError, WriteError
from prcl_fast.files.writing import make_folder, open_plain, write_errors

LOCK = ".prcl.lock"
# The descriptor of a lock that `prcl sweep` took for the run that it starts.
INHERITED = "PRCL_FAST_LOCK"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_LONGEST = 400  # characters of the holder's description
_log = logging.getLogger(__name__)


class FolderInUseError(InputError):
    """Another process writes into the folder."""


class FolderLock:
    """The lock of an existing folder, held until `release`, or until this process ends.

    Processes that this one forks, such as data workers, do not hold it.

    Raises:
        FolderInUseError: another process holds it; the message begins with `key` and names that process.
        WriteError: the lock file cannot be written.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / LOCK
        self.descriptor: int | None = None  # None after the release, and where the file system has no locks
        with write_errors(self._path):
            try:
                self.descriptor = _inherited(self._path)
                if self.descriptor is None:
                    self.descriptor = acquire(self._path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno == errno.EACCES and self._path.is_file():
                    remedy = f"the lock is another user's; delete {self._path} if that process has ended"
                    raise FolderInUseError(_in_use(folder, key, remedy)) from None
                if error.errno not in _NO_LOCKS:
                    raise
                _say_no_locks(error.strerror)
                with contextlib.suppress(OSError):
                    os.unlink(self._path)
                return
        if self.descriptor is None:
            raise FolderInUseError(_in_use(folder, key, "wait for its end, or choose another folder"))
        _held.add(self)
        with contextlib.suppress(OSError):  # on a full disk the lock has no text
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, _own_description().encode(errors="replace"), 0)

    def release(self) -> None:
        """Removes the lock file and releases the lock."""
        if self.descriptor is None:
            return
        with contextlib.suppress(OSError):
            if _is_named(self._path, self.descriptor):
                os.unlink(self._path)
        self.forget()

    def forget(self) -> None:
        """Closes this process's descriptor; the lock stays with processes that have inherited it."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
            _held.discard(self)


@contextlib.contextmanager
def locked_folder(folder: Path, key: str) -> Iterator[None]:
    """Makes the folder where it is missing, and holds its lock during the block.

    A folder made here is removed again if it is empty at the end.

    Raises:
        FolderInUseError: as `FolderLock` does.
        InputError: the folder cannot be made, or its lock not be written.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    make_folder(folder, key)
    try:
        lock = FolderLock(folder, key)
        try:
            yield
        finally:
            lock.release()
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def acquire(path: Path, mode: int, permissions: int = 0o666) -> int | None:
    """A descriptor that holds the lock file `path`, which is made if need be.

    Args:
        mode: of flock.

    Returns:
        None if another process holds the lock and `mode` is non-blocking.

    Raises:
        WriteError: something other than a plain file has the name.
        OSError: the file cannot be opened, or the file system has no locks.
    """
    while True:
        descriptor = open_plain(path, os.O_RDWR | os.O_CREAT, permissions)
        try:
            fcntl.flock(descriptor, mode)
            # A lock file goes with its lock: one without a name excludes no process.
            if _is_named(path, descriptor):
                if os.fstat(descriptor).st_nlink == 1:
                    return descriptor
                os.unlink(path)  # its text would go into a file of another name as well
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


_held: set[FolderLock] = set()


def _forget_in_child() -> None:
    for lock in list(_held):
        lock.forget()


# A forked process shares the lock, and would keep it after this one was killed.
os.register_at_fork(after_in_child=_forget_in_child)


def _is_named(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _inherited(path: Path) -> int | None:
    """The descriptor that the parent process hands over, if it holds the lock `path`."""
    text = os.environ.get(INHERITED, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 8):
        return None
    descriptor = int(text)
    try:
        if not _is_named(path, descriptor):
            return None
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.set_inheritable(descriptor, False)
    except OSError:
        return None
    del os.environ[INHERITED]
    return descriptor


def _own_description() -> str:
    program = os.path.basename(sys.argv[0]).replace("main.py", "prcl")  # of python -m prcl_fast.cli.main
    command = " ".join([program, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}: {command}"


def _in_use(folder: Path, key: str, remedy: str) -> str:
    """One line that names the holder as the lock file does."""
    text = b""
    with contextlib.suppress(OSError, WriteError):
        descriptor = open_plain(folder / LOCK, os.O_RDONLY)
        try:
            text = os.read(descriptor, 4 * _LONGEST)
        finally:
            os.close(descriptor)
    shown = "".join(letter if letter.isprintable() else " " for letter in text.decode(errors="replace"))
    holder = shown[:_LONGEST].strip() or "another process"
    return f"{key}: {folder} is in use by {holder}; {remedy}"


@functools.cache
def _say_no_locks(reason: str) -> None:
    _log.warning("no locks on this file system (%s): start no second command that writes there", reason)
