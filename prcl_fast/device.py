"""Which device a command runs on, and how it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.errors import InputError


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
    """Settings of PyTorch, for the whole process, with which a network runs.

    Args:
        device: CUDA devices with their index.
        threads: of the CPU; None leaves PyTorch's choice.
        tf32: CUDA: float32 products and convolutions may round their factors to TF32's 10 bits.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True  # a training's shapes are fixed; `inference` turns it off


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The context of `train.amp`: "off", "bf16" or "fp16"."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


def full_precision(x: Tensor) -> Tensor:
    """float32 where autocast made less of it; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
