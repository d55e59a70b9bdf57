"""Folders to write into: inside a run none is a link, and a private one is its owner's alone."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from prcl_fast.errors import WriteError
from prcl_fast.files.writing import write_errors

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def check_subfolder(folder: Path) -> None:
    """Refuses what is no true folder, such as a link to one; a missing one is right.

    For folders inside an output. The output itself, and the folders above it, may be links of the user.

    Raises:
        WriteError: `folder` is a link or a file, or cannot be examined.
    """
    with write_errors(folder):
        try:
            mode = os.lstat(folder).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
    if not stat.S_ISDIR(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "no folder"
        raise WriteError(f"{folder}: cannot be written: it is {kind}; remove it")


def make_subfolder(folder: Path) -> None:
    """Makes a folder inside an existing one, or takes it as it is. Raises WriteError as `check_subfolder`."""
    check_subfolder(folder)
    with write_errors(folder):
        folder.mkdir(exist_ok=True)


def make_private_folder(folder: Path) -> None:
    """Makes a folder that only its owner, this user, may write, or makes an existing one so.

    Raises:
        WriteError: it is a link, belongs to another user, or cannot be made.
    """
    with write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    check_subfolder(folder)
    with write_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            state = os.fstat(descriptor)
            if state.st_uid != os.geteuid():
                raise WriteError(f"{folder}: cannot be used: it belongs to another user")
            if state.st_mode & _WRITABLE_BY_OTHERS:
                os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)


def private_fault(state: os.stat_result) -> str | None:
    """A reason not to trust a file of this user's own: its kind, owner or mode. None if there is none."""
    if not stat.S_ISREG(state.st_mode):
        return "no plain file"
    if state.st_uid != os.geteuid():
        return "it belongs to another user"
    return "others may write it" if state.st_mode & _WRITABLE_BY_OTHERS else None
