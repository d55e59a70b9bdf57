"""Where a table of results was made: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from prcl_fast import __version__


def provenance() -> dict[str, Any]:
    """versions, machine and commit, plain types; commit is None where the package is in no git checkout."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "versions": {
            "prcl_fast": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(gpus)],
        },
        "commit": commit(),
    }


def cpu_name() -> str:
    """The processor's model as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Of the sources, with -dirty where they were changed; None where the package is in no git checkout."""
    file = Path(__file__)
    # An environment inside another project's checkout would give that project's commit.
    if not _git(file.parent, "ls-files", file.name):
        return None
    return _git(file.parent, "describe", "--always", "--dirty", "--exclude=*") or None


def _git(folder: Path, *arguments: str) -> str:
    """What git prints, or nothing where it fails or is not there."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
