"""last.pt and its predecessors last-1.pt, last-2.pt, ...: their names and their order."""

from __future__ import annotations

import os
import re
from pathlib import Path


def last_checkpoints(folder: Path) -> list[Path]:
    """last.pt, last-1.pt, ..., newest first, as far as they are there. Raises OSError."""
    paths = [folder / name for name in os.listdir(folder)]
    return sorted((path for path in paths if _age(path) >= 0), key=_age)


def free_last(folder: Path, keep: int) -> None:
    """Frees the name last.pt: each takes the next older name, up to the first free one. Raises OSError.

    The oldest of `keep` gives way only where all names are taken, and at every moment the others are there.
    """
    present = {_age(path) for path in last_checkpoints(folder)}
    free = next(age for age in range(keep) if age not in present or age == keep - 1)
    for age in range(free, 0, -1):
        os.replace(folder / _name(age - 1), folder / _name(age))


def remove_older(folder: Path, keep: int) -> None:
    """Removes what is older than `keep` checkpoints, as after a run that kept more. Raises OSError."""
    for path in last_checkpoints(folder):
        if _age(path) >= keep:
            path.unlink()


def _age(path: Path) -> int:
    """0 for last.pt, n for last-n.pt, -1 for any other file."""
    found = re.fullmatch(r"last(?:-([1-9]\d*))?\.pt", path.name)
    return int(found[1] or 0) if found else -1


def _name(age: int) -> str:
    return f"last-{age}.pt" if age else "last.pt"
