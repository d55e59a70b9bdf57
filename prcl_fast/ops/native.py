"""The two compiled libraries: loading at first use, and the reason where one cannot be loaded.

`_native.so` holds the CPU code of all native ops, `_native_cuda.so` their CUDA code.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OLDEST_TORCH = (2, 11)
_PACKAGE = Path(__file__).resolve().parent.parent
_library = torch.library.Library("prcl_fast_native", "DEF")
_signatures: list[str] = []


def define(schema: str, reference: Callable[..., Any]) -> None:
    """Defines the schema of a native op, which both libraries implement for the signature of `reference`."""
    _library.define(schema)
    signature = inspect.signature(reference)
    parameters = ", ".join(f"{value.name}: {value.annotation}" for value in signature.parameters.values())
    _signatures.append(f"{reference.__name__}({parameters}) -> {signature.return_annotation}")


def interface_mark() -> str:
    """Text that setup.py writes into both libraries: they hold the native ops of these signatures.

    A library that was built for other signatures would crash the process.
    """
    digest = hashlib.sha256("\n".join(sorted(_signatures)).encode()).hexdigest()
    return f"prcl_fast interface {digest[:32]}"


def ops() -> Any:
    """The raw native ops; only to be called where `unavailable` returned None."""
    return torch.ops.prcl_fast_native


def unavailable(device_type: str) -> str | None:
    """Reason why no native op can run on `device_type`, or None."""
    if device_type == "cpu":
        return cpu_library_error()
    if device_type == "cuda":
        return cpu_library_error() or cuda_library_error()
    return f"there is no native code for {device_type}"


@functools.cache
def cpu_library_error() -> str | None:
    """Loads `_native.so`; returns None, or why it is not loaded."""
    return _load("_native.so", "install prcl_fast again without PRCL_NO_NATIVE")


@functools.cache
def cuda_library_error() -> str | None:
    """Loads `_native_cuda.so` and checks that the current device is supported; returns None, or why not."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    error = _load("_native_cuda.so", "install prcl_fast again with nvcc on PATH or CUDA_HOME set")
    if error is None:
        reason = ops().cuda_error()
        error = f"_native_cuda.so cannot run on this device: {reason}" if reason else None
    return error


def _load(name: str, remedy: str) -> str | None:
    path = _PACKAGE / name
    if not path.is_file():
        return f"{name} was not built: {remedy}"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"{name} needs PyTorch {oldest} or newer; this is {torch.__version__}"
    if interface_mark().encode() not in path.read_bytes():
        return f"{name} was built from other sources than this package: install prcl_fast again"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{name} did not load: {error.__cause__ or error}"
    return None
