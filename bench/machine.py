"""The machine of a benchmark: its description in the results, and the memory that a case may take."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from typing import Any

import torch

from prcl_fast import __version__
from prcl_fast.machine.description import (
    commit,
    cpu_name,
    device_name,
    driver_version,
    free_memory,
    package_version,
    usable_cores,
)

_SHARE_OF_MEMORY = 0.7


def describe(device: str) -> dict[str, Any]:
    """The machine as a result carries it."""
    cuda = device == "cuda"
    return {
        "device": device_name(torch.device(device)) if cuda else cpu_name(),
        "device_type": device,
        "driver": driver_version() if cuda else None,
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "prcl_fast": __version__,
        # PRCL_COMMIT names it for a copy without git.
        "commit": commit() or os.environ.get("PRCL_COMMIT", "unknown"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
    }


def fits(needed: int, device: str) -> bool:
    """Whether so many bytes leave a good part of the device's memory free; True where that is unknown."""
    free = free_memory(torch.device(device))
    return free is None or needed <= _SHARE_OF_MEMORY * free
