"""Triton kernels and their launchers, one file per op. Only this module may be imported without Triton."""

from __future__ import annotations

import functools
import importlib.util
import os


@functools.cache
def _triton_is_missing() -> bool:
    return importlib.util.find_spec("triton") is None


def unavailable(device_type: str) -> str | None:
    """Reason why no Triton kernel can run on `device_type`, or None.

    TRITON_INTERPRET=1 must be set before the first kernel is imported: Triton reads it when it decorates.
    """
    if _triton_is_missing():
        return "Triton is not installed: pip install 'prcl-fast[triton]'"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton runs on {device_type} only under TRITON_INTERPRET=1"
    return None
