"""Reading files that users name: plain files only, and no longer than their kind may be."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from prcl_fast.errors import InputError

_OF_NO_SIZE = 1 << 20  # bytes read of a file that reports a size of 0: some of them are endless
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_BLOCK = 1 << 20  # bytes hashed at a time


def special_kind(mode: int) -> str | None:
    """The kind of a special file by its mode, such as "a pipe"; None for a plain file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no plain file")


def check_regular(path: str | Path, what: str) -> int:
    """The size in bytes of a plain file, found without opening it: opening a pipe waits for its writer.

    Args:
        what: the kind of file for messages, such as "split file".

    Raises:
        InputError: naming the file: missing, not accessible, or a folder, pipe, socket or device.
    """
    try:
        state = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # no possible file name: it has a NUL, or half of a surrogate pair
        raise InputError(f"{str(path)!r}: cannot be read: {error}") from None
    kind = special_kind(state.st_mode)
    if kind is not None:
        raise InputError(f"{path}: cannot be read as a {what}: it is {kind}")
    return state.st_size


def read_bytes(path: Path, what: str, max_bytes: int, *, after: int = 0, tail: int | None = None) -> bytes:
    """The content of a plain file.

    Args:
        what: the kind of file for messages.
        max_bytes: longer files are refused before they are read.
        after: bytes to leave out at the beginning.
        tail: at most that many bytes, from the end.

    Raises:
        InputError: naming the file: see `check_regular`; too long.
    """
    check_regular(path, what)  # a device may act when it is opened
    try:
        # Without waiting: a pipe may have taken the name since.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            state = os.fstat(file.fileno())
            kind = special_kind(state.st_mode)
            if kind is not None:
                raise InputError(f"{path}: cannot be read as a {what}: it is {kind}")
            if state.st_size > max_bytes:
                raise InputError(f"{path}: {state.st_size} bytes; a {what} has at most {max_bytes}")
            start = after if tail is None else max(after, state.st_size - tail)
            if start > 0:
                file.seek(start)
            content = file.read(min(max_bytes, state.st_size or _OF_NO_SIZE))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if content is None:  # some files of /proc wait for content, as pipes do
        raise InputError(f"{path}: cannot be read as a {what}: it holds nothing yet")
    return content


def read_text(path: Path, what: str, max_bytes: int) -> str:
    """The UTF-8 text of a plain file, without its byte order mark and with line ends as newlines.

    Args:
        what: the kind of file for messages.
        max_bytes: longer files are refused before they are read.

    Raises:
        InputError: naming the file: see `check_regular`; too long, or not UTF-8.
    """
    content = read_bytes(path, what, max_bytes)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: cannot be read as a {what}: not UTF-8 text at byte {error.start}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def file_digest(path: Path, what: str) -> str:
    """12 hex digits of SHA-256 over the bytes of a plain file.

    Args:
        what: the kind of file for messages.

    Raises:
        InputError: naming the file: see `check_regular`.
    """
    check_regular(path, what)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:12]
