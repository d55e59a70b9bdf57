"""What a number depends on: device, driver, versions, commit, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from prcl_fast import __version__
from prcl_fast.machine import available_memory, commit, cpu_name

_SHARE_OF_MEMORY = 0.7


def describe(device: str) -> dict[str, Any]:
    """The machine as a result carries it."""
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "device_type": device,
        "driver": driver() if cuda else None,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "prcl_fast": __version__,
        # PRCL_COMMIT says it for a copy without git.
        "commit": commit() or os.environ.get("PRCL_COMMIT", "unknown"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def driver() -> str:
    lines = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    return lines[0] if lines else "unknown"


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def fits(needed: int, device: str) -> bool:
    """Whether so many bytes can be had without driving the machine to its limit."""
    return needed <= _SHARE_OF_MEMORY * available_bytes(device)


def available_bytes(device: str) -> int:
    """Memory that nobody uses: of the GPU, or of the machine; a very large number where that is unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    available = available_memory()
    return 1 << 62 if available is None else available


def output(*command: str) -> str:
    """What the command prints, or nothing where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
