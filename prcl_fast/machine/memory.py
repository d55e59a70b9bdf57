"""Main memory: free, resident of this process with its allocator's reserves, and failed allocations."""

from __future__ import annotations

import contextlib
import errno
import re
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMORY, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_SIGNS = ("DefaultCPUAllocator", "out of memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
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


def out_of_memory(error: Exception) -> str | None:
    """One line about a failed allocation, of the host or a GPU; None for any other error.

    PyTorch reports those of the host as a RuntimeError.
    """
    text = str(error)
    known = (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS))
    )
    if not known:
        return None
    asked = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGTPE]i?B)", text)
    size = ""
    if asked:
        size = f": {asked[2] or f'{int(asked[1]) / 2**30:.1f} GiB'} asked for at once"
    place = " on the GPU" if "CUDA" in text else ""
    return (
        f"out of memory{place}{size}; lower train.batch_labeled, train.batch_unlabeled, data.crop or "
        "eval.batch, or raise train.accumulate; `prcl plan CONFIG` estimates the memory"
    )


def _field(file: Path, name: str) -> int | None:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(f"{name}:")]
    return int(found[0].split()[1]) << 10 if found else None
