"""`prcl doctor`: versions, native libraries and the backends of each op."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from prcl_fast import __version__
from prcl_fast.machine.description import command_output, driver_version, gpu_names, package_version
from prcl_fast.ops import native, registry

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEFAULT_CUDA_HOME = Path("/usr/local/cuda")
_OPTIONAL = ("native", "triton")  # torch runs everywhere


def doctor() -> None:
    """Show versions, the state of the native libraries, and the backend of each op on each device."""
    console = Console()
    console.print(_versions())
    console.print(_libraries())
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    table, reasons = _ops(devices)
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(Text(f"({number}) {reason}"))


def _versions() -> Table:
    table = Table("", "version", title="versions", title_justify="left")
    rows = {
        "prcl_fast": __version__,
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "CUDA of PyTorch": torch.version.cuda or "none: this is a CPU build of PyTorch",
        "device": _device(),
        "triton": package_version("triton") or "not installed",
        "nvcc": _nvcc(),
    }
    for name, version in rows.items():
        table.add_row(Text(name), Text(version))
    return table


def _libraries() -> Table:
    table = Table("", "state", title="native libraries", title_justify="left")
    cpu = native.cpu_library_error()
    instructions = "" if cpu else f"loaded, vector instructions: {native.ops().cpu_isa()}"
    table.add_row(Text("_native.so (CPU)"), Text(cpu or instructions))
    table.add_row(Text("_native_cuda.so (CUDA)"), Text(native.unavailable("cuda") or "loaded"))
    return table


def _ops(devices: list[str]) -> tuple[Table, list[str]]:
    """One row per op and device: what `auto` takes for each dtype, what else could run float32 there.

    A backend that cannot run shows the number of its reason. The last column is the number of the order in
    which `auto` tries the backends, and why.
    """
    dtypes = [str(dtype).removeprefix("torch.") for dtype in _DTYPES]
    table = Table(
        Column("op", overflow="fold"), "device", *dtypes, *_OPTIONAL, "why", title="ops", title_justify="left"
    )
    reasons: list[str] = []

    def numbered(reason: str) -> str:
        if reason not in reasons:
            reasons.append(reason)
        return f"({reasons.index(reason) + 1})"

    for name in registry.op_names():
        for device in devices:
            cells = [registry.automatic(name, device, dtype) for dtype in _DTYPES]
            for backend in _OPTIONAL:
                reason = registry.unavailable(name, backend, device)
                cells.append("yes" if reason is None else f"no {numbered(reason)}")
            order = " before ".join(registry.ORDER[device])
            why = numbered(f"{order}, {registry.reason_of_order(name, device)}")
            table.add_row(*map(Text, (name, device, *cells, why)))
    return table, reasons


def _device() -> str:
    if not torch.cuda.is_available():
        return "CPU only: PyTorch sees no CUDA device"
    return f"{', '.join(gpu_names())}, driver {driver_version()}"


def _nvcc() -> str:
    """The compiler that setup.py takes."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    in_home = shutil.which("nvcc", path=str(Path(home or _DEFAULT_CUDA_HOME) / "bin"))
    on_path = shutil.which("nvcc")
    path = in_home or on_path if home else on_path or in_home
    if path is None:
        return f"not found in CUDA_HOME, on PATH or in {_DEFAULT_CUDA_HOME}"
    found = re.search(r"release (\S+),", command_output(path, "--version"))
    return f"{found[1] if found else 'of unknown version'} ({path})"
