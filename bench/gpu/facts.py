"""Facts about a machine: GPU, versions, packages, tools, and state of the native library.

python -m bench gpu-facts FILE

FILE is written after every stage, the fastest first. Exit status 1: a package of other phases is missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.arguments import parser
from prcl_fast.files.writing import write_text

IMPORTED = (
    "numpy", "yaml", "PIL", "pydantic", "typer", "rich", "pytest", "xdist", "pytest_timeout",
    "tensorboard.summary.writer.record_writer",  # `import tensorboard` alone loads nothing
)  # fmt: skip
TOOLS = ("nvcc", "g++", "compute-sanitizer", "ncu", "nvidia-smi")


def main(arguments: Sequence[str]) -> int:
    """`python -m bench gpu-facts`."""
    command = parser("gpu-facts", __doc__)
    command.add_argument("file", type=Path, metavar="FILE", help="JSON file to write")
    path = command.parse_args(arguments).file
    facts: dict[str, Any] = {"python": platform.python_version()}

    def add(**more: Any) -> None:
        facts.update(more)
        write_text(path, json.dumps(facts, indent=1) + "\n")

    distributions = importlib.metadata.distributions()
    add(
        tools={name: shutil.which(name) for name in TOOLS},
        packages=dict(sorted((x.metadata["Name"] or "", x.version) for x in distributions)),
    )
    start = time.perf_counter()
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    add(
        torch=torch.__version__,
        torch_import_s=round(time.perf_counter() - start, 1),
        cuda=torch.version.cuda,
        gpu=gpu,
        capability="{}.{}".format(*torch.cuda.get_device_capability()) if gpu else None,
    )
    from bench import machine
    from prcl_fast.machine.description import command_output
    from prcl_fast.ops import native
    from prcl_fast.ops.registry import BACKENDS, op_names, unavailable

    device = "cuda" if gpu else "cpu"
    add(
        native=native.unavailable(device),
        machine=machine.describe(device),
        nvidia_smi=command_output("nvidia-smi").splitlines(),
    )
    if gpu:
        properties = torch.cuda.get_device_properties(0)
        add(
            multiprocessors=properties.multi_processor_count,
            l2_bytes=properties.L2_cache_size,
            memory_bytes=properties.total_memory,
            cudnn=torch.backends.cudnn.version(),
        )
    reasons = {(x, unavailable(op, x, device)) for x in BACKENDS for op in op_names()}
    missing = _not_importable()
    add(
        not_available=sorted(f"{backend}: {reason}" for backend, reason in reasons if reason),
        not_importable=missing,
    )
    print(f"{facts['machine']['device']}; Python {facts['python']}, PyTorch {torch.__version__}")
    for line in facts["not_available"]:
        print(line)
    if missing:
        print("not importable: " + "; ".join(f"{name}: {reason}" for name, reason in missing.items()))
        return 1
    print("native library: " + (facts["native"] or "loads and runs"))
    return 0


def _not_importable() -> dict[str, str]:
    found = {}
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # an extension built for another platform raises others than ImportError
            found[name] = f"{type(error).__name__}: {error}"
    return found
