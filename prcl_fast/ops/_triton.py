"""The Triton backend of an op; Triton and the kernels are imported at an op's first call."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from prcl_fast import kernels
from prcl_fast.ops._backend import Implementation

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def implementation(
    module: str, call: Callable[..., Any], *, dtypes: Sequence[torch.dtype] = _DTYPES
) -> Implementation:
    """The Triton backend of an op.

    Args:
        module: of prcl_fast.kernels.
        call: called as call(the module, *arguments of the op).
        dtypes: what the kernels take.
    """

    def function(*arguments: Any) -> Any:
        return call(importlib.import_module(f"prcl_fast.kernels.{module}"), *arguments)

    def reason(device_type: str, dtype: torch.dtype) -> str | None:
        if dtype not in dtypes:
            return f"there is no Triton kernel for {str(dtype).removeprefix('torch.')}"
        return kernels.unavailable(device_type)

    return Implementation(function, reason)
