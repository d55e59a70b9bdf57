"""`prcl doctor`: versions, native libraries and the backends of each op."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

from prcl_fast import __version__
from prcl_fast.console import print_table, say

_DEFAULT_CUDA_HOME = Path("/usr/local/cuda")
_OPTIONAL = ("native", "triton")  # torch runs everywhere


def doctor() -> None:
    """Show versions, native libraries and the backend of each op."""
    import torch

    print_table("versions", ("", "version"), _versions())
    print_table("native libraries", ("", "state"), _libraries())
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    columns, rows, reasons = _ops(devices)
    print_table("ops", columns, rows)
    for number, reason in enumerate(reasons, 1):
        say(f"({number}) {reason}")


def _versions() -> list[tuple[str, str]]:
    import torch

    from prcl_fast.machine.description import package_version

    return [
        ("prcl_fast", __version__),
        ("Python", platform.python_version()),
        ("PyTorch", torch.__version__),
        ("CUDA of PyTorch", torch.version.cuda or "none: this is a CPU build of PyTorch"),
        ("device", _device()),
        ("triton", package_version("triton") or "not installed"),
        ("nvcc", _nvcc()),
    ]


def _libraries() -> list[tuple[str, str]]:
    from prcl_fast.ops import native

    cpu = native.cpu_library_error()
    instructions = "" if cpu else f"loaded, vector instructions: {native.ops().cpu_isa()}"
    return [
        ("_native.so (CPU)", cpu or instructions),
        ("_native_cuda.so (CUDA)", native.unavailable("cuda") or "loaded"),
    ]


def _ops(devices: list[str]) -> tuple[list[str], list[list[str]], list[str]]:
    """Columns, rows and numbered reasons; one row per op and device.

    A row shows what `auto` takes for each dtype, and what else could run float32 there. A backend that cannot
    run shows the number of its reason. The last column is the number of the order in which `auto` tries the
    backends, and why.
    """
    import torch

    from prcl_fast.ops import registry

    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    rows: list[list[str]] = []
    reasons: list[str] = []

    def numbered(reason: str) -> str:
        if reason not in reasons:
            reasons.append(reason)
        return f"({reasons.index(reason) + 1})"

    for name in registry.op_names():
        for device in devices:
            cells = [registry.automatic(name, device, dtype) for dtype in dtypes]
            for backend in _OPTIONAL:
                reason = registry.unavailable(name, backend, device)
                cells.append("yes" if reason is None else f"no {numbered(reason)}")
            order = " before ".join(registry.ORDER[device])
            rows.append(
                [name, device, *cells, numbered(f"{order}, {registry.reason_of_order(name, device)}")]
            )
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return ["op", "device", *names, *_OPTIONAL, "why"], rows, reasons


def _device() -> str:
    import torch

    from prcl_fast.machine.description import driver_version, gpu_names

    if not torch.cuda.is_available():
        return "CPU only: PyTorch sees no CUDA device"
    return f"{', '.join(gpu_names())}, driver {driver_version()}"


def _nvcc() -> str:
    """The compiler that setup.py takes."""
    from prcl_fast.machine.description import command_output

    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    in_home = shutil.which("nvcc", path=str(Path(home or _DEFAULT_CUDA_HOME) / "bin"))
    on_path = shutil.which("nvcc")
    path = in_home or on_path if home else on_path or in_home
    if path is None:
        return f"not found in CUDA_HOME, on PATH or in {_DEFAULT_CUDA_HOME}"
    found = re.search(r"release (\S+),", command_output(path, "--version"))
    return f"{found[1] if found else 'of unknown version'} ({path})"
