"""Writing files: whole or not at all, never through a link, and one error that names the file.

A file is written under a temporary name beside its own, .NAME.prcl-RANDOM.tmp, and then takes its own name.
Nobody can put a link under the temporary name: it is random, and the system creates no file where one exists.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from prcl_fast.errors import InputError, WriteError
from prcl_fast.files.reading import special_kind

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
# To open a pipe would wait for its reader.
_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK
_LONGEST_NAME = 255  # bytes; on every usual file system
_TEMPORARY = re.compile(r"\.(.+)\.prcl-[0-9a-f]{16}\.tmp")


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False, private: bool = False) -> Iterator[BinaryIO]:
    """A new file, open for writing, that becomes `path` when the block ends.

    At every moment `path` holds its former or its new bytes, also while several processes write it. A link,
    pipe or device under that name is replaced, and its target left alone. An error in the block leaves `path`
    as it was and removes the new file.

    Args:
        durable: for files of a run. Bytes and name are on the disk when the block has ended. The folder must
            exist, because a run whose folder was deleted must not make it again; otherwise parent folders are
            made.
        private: only this user may read and write the file.

    Raises:
        WriteError: `path` cannot be written, or an OSError left the block.
    """
    temporary = _temporary(path)
    with write_errors(path):
        if not durable:
            path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(temporary, _NEW, 0o600 if private else 0o666), "wb")
        try:
            yield file
            if durable:
                sync(file)
            file.close()
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to report
                file.close()
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        if durable:
            _sync_folder(path.parent)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder that becomes `path`, missing or an empty folder, when the block ends.

    Parent folders are made. An error in the block removes the new folder. A link to a folder is followed.

    Raises:
        InputError: `path` exists already and is not an empty folder, or it is the working directory.
        WriteError: `path` cannot be written, or an OSError left the block.
    """
    path = _empty_or_missing(path)
    temporary = _temporary(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, data: Any, *, durable: bool = False) -> None:
    """Writes `data` (bytes-like) as `replacing` does. Raises WriteError."""
    with replacing(path, durable=durable) as file:
        file.write(data)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Writes UTF-8 text as `replacing` does, with the line ends as given. Raises WriteError."""
    write_bytes(path, text.encode(), durable=durable)


def append(path: Path, data: bytes) -> None:
    """Adds `data` to the end of `path`, without waiting for the disk.

    The file is opened for each call, so that a folder deleted meanwhile is noticed.

    Raises:
        WriteError: `path` cannot be written, or is no plain file.
    """
    with open_append(path) as file, write_errors(path):
        while data:
            data = data[file.write(data) :]


def open_append(path: Path) -> io.FileIO:
    """The plain file `path`, made if need be, open for writing at its end. Raises WriteError."""
    with write_errors(path):
        return io.FileIO(open_plain(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def open_plain(path: Path, flags: int, permissions: int = 0o666) -> int:
    """A descriptor of a plain file, which is opened without waiting and not through a link.

    Raises:
        WriteError: something else has the name.
        OSError: the file cannot be opened.
    """
    with contextlib.suppress(OSError):  # the open below reports a missing file or folder
        _refuse_special(path, os.lstat(path))
    descriptor = os.open(path, flags | _PLAIN, permissions)
    try:
        _refuse_special(path, os.fstat(descriptor))  # the file may have been replaced since lstat
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def sync(file: BinaryIO) -> None:
    """Returns when what was written to an open file is on the disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Returns when what was written to the plain file `path` is on the disk. Raises WriteError."""
    with write_errors(path):
        descriptor = open_plain(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path, key: str) -> None:
    """Makes a folder and its parents where they are missing. Raises InputError that begins with `key`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{key}: {folder} is not a folder") from None
    except OSError as error:
        raise InputError(f"{key}: {folder} cannot be written: {error.strerror or error}") from None


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files that killed writers have left in `folder`, of all files or of `name` alone.

    The caller must be the only process that writes them.

    Raises:
        WriteError: `folder` cannot be read, or a file not removed.
    """
    with write_errors(folder), os.scandir(folder) as entries:
        for entry in entries:
            found = _TEMPORARY.fullmatch(entry.name)
            if found and name in (None, found[1]) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Makes an OSError of the block a WriteError that names `path`."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}", error.errno) from None


def user_cache() -> Path | None:
    """`prcl_fast` in $XDG_CACHE_HOME, or in ~/.cache; it may not exist yet. None where the user has no home.

    By the XDG specification, a relative $XDG_CACHE_HOME does not count.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # no HOME, and no entry of the user in the system's list: a container's --user
            return None
    return base / "prcl_fast"


def _empty_or_missing(path: Path) -> Path:
    """The absolute path of a new folder. Raises InputError where it cannot be made, and WriteError."""
    with write_errors(path):
        target = Path(os.path.realpath(path) if path.is_dir() else os.path.abspath(path))
        if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
            raise InputError(f"{path}: exists already and is not an empty folder")
    # The new folder replaces the empty one, and whoever works there would be left in a deleted folder.
    if target == Path.cwd():
        raise InputError(f"{path}: is the working directory; name a new folder")
    return target


def _temporary(path: Path) -> Path:
    ending = f".prcl-{secrets.token_hex(8)}.tmp"
    # A name may be as long as the file system allows: the temporary one has only its beginning.
    start = os.fsdecode(os.fsencode(path.name)[: _LONGEST_NAME - len(ending) - 1])
    return path.parent / f".{start}{ending}"


def _refuse_special(path: Path, state: os.stat_result) -> None:
    kind = special_kind(state.st_mode)
    if kind is not None:
        raise WriteError(f"{path}: cannot be written: it is {kind}")


def _sync_folder(folder: Path) -> None:
    """Returns when the names in `folder` are on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such call for folders
            raise
    finally:
        os.close(descriptor)
