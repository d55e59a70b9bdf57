"""Runs tests once for each place: a pair of a device and a backend that can run an op there.

The place cpu-emulated is the CUDA code compiled for the CPU (cuda_emulation/): its indices and sums can
be checked without a GPU. Triton runs in its interpreter where there is no GPU (conftest.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.utils import _pytree as tree

from prcl_fast.ops import native, registry, use_backend
from support import cuda_emulation
from support.paths import ROOT

_PLACES = (
    ("cpu", "torch"),
    ("cpu", "native"),
    ("cpu", "triton"),
    ("cpu", "emulated"),
    ("cuda", "torch"),
    ("cuda", "native"),
    ("cuda", "triton"),
)
# Set in the processes that `rerun` starts: only the place named takes part.
_ONLY = os.environ.get("PRCL_TEST_PLACE")


def everywhere(op: str) -> Any:
    """Parametrises a test over (device, backend); places where the op cannot run skip, saying why."""
    places = [pytest.param(*place, marks=_marks(op, place), id="-".join(place)) for place in _PLACES]
    return pytest.mark.parametrize(("device", "backend"), places)


def run_everywhere(op: str) -> Any:
    """A fixture that repeats all tests of its module at every place of `op`.

    The module's function of that name is wrapped: tensors go to the place's device and come back, so that the
    tests need not know where they run. A test skips, saying why, where the place has no code for the dtype of
    its first floating-point tensor.
    """

    places = [pytest.param(place, marks=_marks(op, place), id="-".join(place)) for place in _PLACES]

    @pytest.fixture(autouse=True, params=places)
    def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
        device, backend = request.param
        function = getattr(request.module, op)
        monkeypatch.setattr(request.module, op, _moved(function, op, device, backend))
        with on_backend(backend):
            yield device, backend

    return place


@contextlib.contextmanager
def on_backend(backend: str) -> Iterator[None]:
    """Runs every op on `backend`."""
    if backend != "emulated":
        with use_backend(backend):
            yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "ops", lambda: torch.ops.prcl_fast_emulated)
        with use_backend("native"):
            yield


def skip_on_one_thread(device: str, backend: str) -> None:
    """Skips a test that compares numbers of threads where the kernels know only one."""
    if device == "cpu" and backend in ("triton", "emulated"):
        pytest.skip(f"{backend} kernels run on one thread on the CPU")


def rerun(files: Sequence[str], place: str, **environment: str) -> None:
    """Test files' tests at one place, in a process with another environment; at least one must have run."""
    options = ["-k", "not compile and not opcheck", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env=os.environ | {"PRCL_TEST_PLACE": place} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


def _moved(function: Callable[..., Any], op: str, device: str, backend: str) -> Callable[..., Any]:
    def move(values: Any, to: str) -> Any:
        if dataclasses.is_dataclass(values) and not isinstance(values, type):
            fields = dataclasses.fields(values)
            return type(values)(**{field.name: getattr(values, field.name).to(to) for field in fields})
        return values.to(to) if isinstance(values, torch.Tensor) else values

    def moved(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # a graph holds no look at libraries, and its dtype is known
            tensors = [value for value in tree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            dtype = next((value.dtype for value in tensors if value.is_floating_point()), torch.float32)
            reason = _missing_dtype(op, device, backend, dtype)
            if reason is not None:
                pytest.skip(reason)
        if device == "cpu":
            return function(*args, **kwargs)
        args, kwargs = tree.tree_map(lambda value: move(value, device), (args, kwargs))
        return tree.tree_map(lambda value: move(value, "cpu"), function(*args, **kwargs))

    return moved


def _marks(op: str, place: tuple[str, str]) -> list[pytest.MarkDecorator]:
    reason = _reason(op, *place) if _ONLY in (None, "-".join(place)) else f"this process tests {_ONLY}"
    gpu = [pytest.mark.gpu] if place[0] == "cuda" else []
    return [*gpu, pytest.mark.skipif(reason is not None, reason=str(reason))]


def _missing_dtype(op: str, device: str, backend: str, dtype: torch.dtype) -> str | None:
    """Reason why a place has no code for a dtype; None if it has, or if float32 has the same reason."""
    if backend == "emulated":  # the same code, compiled for the CPU
        device, backend = "cuda", "native"
    reason = registry.unavailable(op, backend, device, dtype)
    return None if reason == registry.unavailable(op, backend, device) else reason


def _reason(op: str, device: str, backend: str) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if backend == "emulated":
        return cuda_emulation.load()
    return registry.unavailable(op, backend, device)
