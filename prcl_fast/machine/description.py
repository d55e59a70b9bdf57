"""The description of the machine and its software, for results and for `prcl doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from prcl_fast import __version__
from prcl_fast.machine.memory import available_memory


def provenance() -> dict[str, Any]:
    """versions, machine and commit, plain types; commit is None where the package is in no git checkout."""
    return {
        "versions": {
            "prcl_fast": __version__,
            "torch": str(torch.__version__),  # a subclass of str, which no checkpoint may hold
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "gpus": gpu_names()},
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """The model of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def free_memory(device: torch.device) -> int | None:
    """Bytes of the device that this process could still take, or None where that is unknown."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def gpu_names() -> list[str]:
    """The model of each GPU that this process sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(index) for index in range(count)]


def driver_version() -> str:
    """The version of the NVIDIA driver, or "unknown"."""
    lines = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    return lines[0] if lines else "unknown"


def cpu_name() -> str:
    """The model of the processor as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def package_version(name: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the sources, with -dirty where they differ from it; None outside of a git checkout."""
    file = Path(__file__)
    # An environment inside another project's checkout would give that project's commit.
    if not command_output("git", "-C", str(file.parent), "ls-files", file.name):
        return None
    command = ("git", "-C", str(file.parent), "describe", "--always", "--dirty", "--exclude=*")
    return command_output(*command).strip() or None


def command_output(*command: str) -> str:
    """The standard output of a command, or "" where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
