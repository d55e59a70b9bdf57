"""Memory as the system counts it: what is free, and what this process holds with its allocator's reserves."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from prcl_fast import __version__

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMORY, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_RESET_PEAK = "5"  # proc(5)


def available_memory() -> int | None:
    """Bytes that this process could still take, a container's limit included; None where nothing says so."""
    available = _field(_MEMORY, "MemAvailable")
    if available is None:
        return None
    try:
        limit, used = (int((_CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit
        return available
    return max(0, min(available, limit - used))


def resident_bytes() -> int | None:
    """What is resident now; None where the system does not say."""
    return _field(_STATUS, "VmRSS")


def resident_peak() -> int:
    """The most that was resident, since `reset_resident_peak` where that is possible."""
    known = _field(_STATUS, "VmHWM")
    if known is not None:
        return known
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def reset_resident_peak() -> bool:
    """Starts the peak anew; False where the system cannot."""
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK)
        return True
    return False


def _field(file: Path, name: str) -> int | None:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(f"{name}:")]
    return int(found[0].split()[1]) << 10 if found else None


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
