"""Archives that a check leaves."""

from __future__ import annotations

import tarfile
from pathlib import Path


def contents(archive: Path) -> dict[str, str]:
    """The text of each file, by its name."""
    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member) for member in tar}
        return {name: file.read().decode() for name, file in files.items() if file is not None}
