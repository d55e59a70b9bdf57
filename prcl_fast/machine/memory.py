"""Main memory: what is free, and what is resident of this process, its allocator's reserves included."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMORY, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_RESET_PEAK = "5"  # proc(5)


def available_memory() -> int | None:
    """Bytes that this process could still take, a container's limit included; None where it is unknown."""
    available = _field(_MEMORY, "MemAvailable")
    if available is None:
        return None
    try:
        limit, used = (int((_CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit
        return available
    return max(0, min(available, limit - used))


def resident_bytes() -> int | None:
    """Resident memory; None where it is unknown."""
    return _field(_STATUS, "VmRSS")


def resident_peak() -> int:
    """The peak of the resident memory, since `reset_resident_peak` where that is possible."""
    known = _field(_STATUS, "VmHWM")
    if known is not None:
        return known
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def reset_resident_peak() -> bool:
    """Restarts the peak from the present memory; False where the system cannot."""
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
