"""Registry of the ops: schema, implementations, and the choice of a backend.

An op is declared once, by the signature of its reference: the schema is read from it. The op exists in
Python, as `prcl_fast::NAME`, even where nothing could be compiled, and has one implementation per backend:

- `torch`: plain PyTorch on every device: the reference, or its faster version in `prcl_fast.chunked`;
- `native`: `prcl_fast_native::NAME`, of the same schema, from the compiled C++ (CPU) and CUDA libraries;
- `triton`: NAME in the module of `prcl_fast.kernels` that is named as the reference's, on CUDA, or anywhere
  under `TRITON_INTERPRET=1`.

The implementation is looked up when the op runs, so a choice made by `use_backend` also holds inside compiled
graphs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from prcl_fast import kernels
from prcl_fast.ops import native
from prcl_fast.ops.arguments import HALF

BACKENDS = ("torch", "native", "triton")

# The backends that `auto` tries, best first. One that cannot run an op (not built, not installed, no kernel
# for the dtype) is passed over; torch always runs. Triton is the path of a GPU without nvcc.
ORDER: Mapping[str, Sequence[str]] = {"cpu": ("native", "torch"), "cuda": ("native", "triton", "torch")}

# Why native is the first: "measured", "estimated" or "by design"; `prcl doctor` prints it. Estimates compare
# warp-instructions of the hot loops in SASS for sm_90, with bfloat16 features, 21 classes and 256 dimensions;
# `python tests/ops/test_triton_compile.py --instructions` prints those of Triton. A measurement on a GPU
# replaces the estimate, and the order if it differs.
_BY_DESIGN = {
    "cpu": "by design: it uses the processor's widest vectors; not measured yet",
    "cuda": "by design: it has its registers, shuffles and shared memory in hand; not measured yet",
}
_VOC = "measured: bench/results/cpu_voc.json"
_NETWORK = "measured: bench/results/cpu_voc_network.json"
_ESTIMATE = "estimated from SASS: {} against {} warp-instructions a {}"
REASONS: Mapping[str, Mapping[str, str]] = {
    "cpu": {
        "mutual_likelihood_score": _VOC,
        "mutual_likelihood_score_backward": _VOC,
        "prototype_statistics": _VOC,
        "class_lists": "by design: a counting sort in two passes; part of sample_anchors' time",
        "sample_anchors": _VOC,
        "sample_negatives": _VOC,
        "philox_normal": "by design: the same bits as on CUDA, without temporaries",
        "probabilistic_info_nce": _VOC,
        "probabilistic_info_nce_backward": f"{_VOC}; level with torch, the zeroing of memory bounds both",
        "pseudo_label": _VOC,
        "upsample_bilinear": f"{_NETWORK}; PyTorch's own operation is level with it",
        "upsample_bilinear_backward": f"{_NETWORK}; PyTorch's own operation is level with it",
        "upsample_cross_entropy": _VOC,
        "variance_head_moments": _NETWORK,
        "variance_head": _NETWORK,
        "variance_head_backward_sums": _NETWORK,
        "variance_head_backward": _NETWORK,
    },
    "cuda": {
        "prototype_statistics": _ESTIMATE.format(59, 96, "row"),
        "probabilistic_info_nce": _ESTIMATE.format(119, 164, "candidate row"),
        "pseudo_label": _ESTIMATE.format(319, 845, "32 pixels"),
        # Two programs compute the pixels at a tile's edges: 510 times 1.19 and 517 times 1.33.
        "upsample_cross_entropy": _ESTIMATE.format(607, 687, "32 pixels"),
    },
}

_library = torch.library.Library("prcl_fast", "DEF")
_selected = "auto"


class BackendUnavailableError(RuntimeError):
    """The chosen backend cannot run this op here; the message gives the reason."""


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
_schemas: dict[str, str] = {}


def define_op(
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    prepared: Callable[..., Iterable[Any]] | None = None,
    finished: Callable[..., Any] | None = None,
    kernel_dtypes: Sequence[torch.dtype] = (torch.float32, *HALF),
    torch_version: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """Registers the op of a reference for CPU and CUDA, with all its implementations.

    Args:
        reference: gives the op its name and its schema, and is the specification of its results.
        fake: the op for tensors without values.
        prepared: arguments of the op -> those of the native and Triton kernels; None if they are the same.
        finished: (result of such a kernel, *arguments of the op) -> the op's result; None if it is the same.
        kernel_dtypes: dtypes of the CUDA and Triton kernels; the native CPU code takes float64 as well.
        torch_version: runs as the `torch` backend in place of the reference.
        backward, setup_context: the autograd formula, as in `torch.library.register_autograd`.
    Returns:
        The callable overload, `torch.ops.prcl_fast.<name>.default`.
    """
    name = reference.__name__
    module = f"prcl_fast.kernels.{reference.__module__.rpartition('.')[2]}"
    schema = torch.library.infer_schema(reference, op_name=name, mutates_args=())
    if "=" in schema:  # PyTorch would drop arguments that equal their default
        raise ValueError(f"the reference of {name} must have no default values; its schema is {schema}")

    def calling(kernel: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        def function(*arguments: Any) -> Any:
            result = kernel()(*(arguments if prepared is None else prepared(*arguments)))
            return result if finished is None else finished(result, *arguments)

        return function

    _schemas[name] = schema
    _implementations[name] = {
        "torch": Implementation(torch_version or reference),
        "native": Implementation(
            calling(lambda: getattr(native.ops(), name)), functools.partial(_no_native, kernel_dtypes)
        ),
        # The first call imports Triton and the kernels.
        "triton": Implementation(
            calling(lambda: getattr(importlib.import_module(module), name)),
            functools.partial(_no_triton, kernel_dtypes),
        ),
    }
    native.define(schema, reference)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*arguments: Any) -> Any:
        device_type, dtype = "cpu", torch.float32
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                device_type = argument.device.type
                if argument.is_floating_point():
                    dtype = argument.dtype
                    break
        return select(name, device_type, dtype)(*arguments)

    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"prcl_fast::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"prcl_fast::{name}", backward, setup_context=setup_context, lib=_library
        )
    return getattr(torch.ops.prcl_fast, name).default


def _no_native(dtypes: Sequence[torch.dtype], device_type: str, dtype: torch.dtype) -> str | None:
    if device_type == "cuda" and dtype not in dtypes:
        return f"there is no native CUDA code for {str(dtype).removeprefix('torch.')}"
    return native.unavailable(device_type)


def _no_triton(dtypes: Sequence[torch.dtype], device_type: str, dtype: torch.dtype) -> str | None:
    if dtype not in dtypes:
        return f"there is no Triton kernel for {str(dtype).removeprefix('torch.')}"
    return kernels.unavailable(device_type)


def select(name: str, device_type: str, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    """The function that runs op `name` on `device_type` with values of `dtype` now.

    Raises:
        BackendUnavailableError: the chosen backend cannot run it, with the reason.
    """
    backend = _selected
    if backend == "auto":
        return _implementations[name][automatic(name, device_type, dtype)].function
    reason = unavailable(name, backend, device_type, dtype)
    if reason is not None:
        raise BackendUnavailableError(f"{name}: backend '{backend}' cannot run on {device_type}: {reason}")
    return _implementations[name][backend].function


def automatic(name: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that `auto` chooses: the first of `ORDER` that can run the op."""
    return next(
        backend
        for backend in ORDER[device_type]
        if _implementations[name][backend].unavailable(device_type, dtype) is None
    )


def unavailable(name: str, backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Reason why `backend` cannot run op `name` on `device_type` with `dtype`, or None if it can."""
    return _implementations[name][backend].unavailable(device_type, dtype)


def reason_of_order(name: str, device_type: str) -> str:
    """Reason for the order in `ORDER` of op `name` on `device_type`."""
    return REASONS[device_type].get(name, _BY_DESIGN[device_type])


def op_names() -> tuple[str, ...]:
    """All registered ops, in the order of their registration."""
    return tuple(_implementations)


def schemas() -> tuple[str, ...]:
    """The schemas of all registered ops, which are those of their native kernels too."""
    return tuple(_schemas.values())


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
