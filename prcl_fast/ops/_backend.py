"""The one place where an op's implementation is chosen, and where ops are registered.

An op is a schema in the `prcl_fast` namespace, defined here in Python so that it exists even where nothing
could be compiled, with one implementation per backend:

- `torch`: the plain PyTorch reference, on every device;
- `native`: the compiled C++ (CPU) and CUDA libraries;
- `triton`: Triton kernels, on CUDA, or anywhere under `TRITON_INTERPRET=1`.

What `auto` takes stands in `_preference.py`. The implementation is looked up when the op runs, so a choice
made by `use_backend` also holds inside compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from prcl_fast.ops._preference import preference

BACKENDS = ("torch", "native", "triton")

_library = torch.library.Library("prcl_fast", "DEF")
_selected = "auto"


class BackendUnavailableError(RuntimeError):
    """The chosen backend cannot run this op here; the message says why."""


def _always(device_type: str, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One backend's function for an op.

    `unavailable(device_type, dtype)` returns None where it can run and the reason, one sentence, where it
    cannot; `dtype` is that of the op's first floating-point tensor, float32 where it has none.
    """

    function: Callable[..., Any]
    unavailable: Callable[[str, torch.dtype], str | None] = _always


_implementations: dict[str, dict[str, Implementation]] = {}


def define_op(
    schema: str,
    *,
    fake: Callable[..., Any],
    implementations: Mapping[str, Implementation],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """Registers `prcl_fast::<schema>` for CPU and CUDA, with its fake kernel and, if given, autograd formula.

    Returns the callable overload, `torch.ops.prcl_fast.<name>.default`.
    """
    name = schema.split("(", 1)[0]
    _implementations[name] = dict(implementations)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
        return select(name, tensors[0].device.type, dtype)(*args)

    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"prcl_fast::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"prcl_fast::{name}", backward, setup_context=setup_context, lib=_library
        )
    return getattr(torch.ops.prcl_fast, name).default


def select(name: str, device_type: str, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    """The function that runs op `name` on `device_type` with values of `dtype` now.

    Raises:
        BackendUnavailableError: the chosen backend cannot run it, with the reason.
    """
    backend = automatic(name, device_type, dtype) if _selected == "auto" else _selected
    reason = unavailable(name, backend, device_type, dtype)
    if reason is not None:
        raise BackendUnavailableError(f"{name}: backend '{backend}' cannot run on {device_type}: {reason}")
    return _implementations[name][backend].function


def automatic(name: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that `auto` chooses: the first of the op's preference that can run, `torch` at last."""
    order = preference(name, device_type).order
    return next(
        (backend for backend in order if unavailable(name, backend, device_type, dtype) is None), "torch"
    )


def unavailable(name: str, backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why `backend` cannot run op `name` on `device_type` with values of `dtype`, or None if it can."""
    implementation = _implementations[name].get(backend)
    if implementation is None:
        return "this op has no such implementation"
    return implementation.unavailable(device_type, dtype)


def op_names() -> tuple[str, ...]:
    """All registered ops, in the order of their registration."""
    return tuple(_implementations)


class use_backend:  # noqa: N801 -- reads as a function; also a context manager, like torch.set_grad_enabled
    """Chooses the backend of every op: "auto", "torch", "native" or "triton".

    Acts at once; as a context manager it restores the former choice on leaving. The choice is process-wide,
    because backward passes run in threads of their own.

    Raises:
        ValueError: unknown name. An op that the backend cannot run raises BackendUnavailableError.
    """

    def __init__(self, name: str) -> None:
        global _selected
        if name not in ("auto", *BACKENDS):
            raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
        self._former = _selected
        _selected = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _selected
        _selected = self._former
