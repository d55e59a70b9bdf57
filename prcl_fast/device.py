"""Devices: the choice of one, and the settings of PyTorch for it."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

from prcl_fast.errors import InputError

# Parameters of mallopt, <malloc.h>. glibc maps blocks above M_MMAP_THRESHOLD bytes one by one and unmaps them
# when they are freed; it returns free memory above M_TRIM_THRESHOLD bytes at the end of the heap.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def choose_device(name: str) -> torch.device:
    """The device of "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: an unknown name, or a device that this machine does not have.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if available else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: {name!r} is not one of auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: {name!r} is not one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= available:
        raise InputError(f"device: {name} was asked for, but this machine has {available} CUDA devices")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def prepare_device(device: torch.device, *, threads: int | None, tf32: bool) -> None:
    """Sets up PyTorch and the C library, for the whole process, to run a network on `device`.

    Args:
        device: CUDA devices with their index.
        threads: of the CPU; None leaves PyTorch's choice.
        tf32: CUDA: float32 products and convolutions may round their factors to TF32's 10 bits.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cpu":
        _keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True  # a training's shapes are fixed; `inference` turns it off


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory for later tensors, as PyTorch does on CUDA.

    By default it returns large blocks to the system, and their pages fault again in every step. Other C
    libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The context of `train.amp`: "off", "bf16" or "fp16"."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32 where autocast lowered its precision; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
