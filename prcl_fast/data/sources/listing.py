"""Files of a folder by name: hidden files are passed over, and Unicode forms of a name are equal.

macOS writes an accented letter as two characters (NFD) where other systems write one (NFC).
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from prcl_fast.errors import InputError


def composed(name: str) -> str:
    """The name in the form NFC, by which names are compared."""
    return unicodedata.normalize("NFC", name)


def files_below(folder: Path) -> dict[str, Path]:
    """The files and folders directly in a folder by their composed names; empty if there is no such folder.

    Raises:
        InputError: the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
    return {composed(name): folder / name for name in sorted(names) if not name.startswith(".")}


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from `folder` down, with the names of its files, both in the order of names.

    Links are followed. A folder that several links lead to comes once, so links in a circle end.

    Raises:
        InputError: a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}")

    seen = set()
    for place, subfolders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(place), sorted(name for name in files if not name.startswith("."))


def existing(root: Path, path: str) -> Path | None:
    """The file at a path below `root`, in the form of its name on disk; None if there is none."""
    for form in (path, composed(path), unicodedata.normalize("NFD", path)):
        if os.path.isfile(root / form):
            return root / form
    return None
