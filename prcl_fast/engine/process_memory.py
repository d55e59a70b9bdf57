"""Memory of this process as the system counts it, with what its allocator holds back between uses."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5)


def resident_bytes() -> int | None:
    """What is resident now; None where the system does not say."""
    return _field("VmRSS")


def resident_peak() -> int:
    """The most that was resident, since `reset_resident_peak` where that is possible."""
    known = _field("VmHWM")
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


def _field(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(f"{name}:")]
    return int(found[0].split()[1]) << 10 if found else None
