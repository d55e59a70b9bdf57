"""What every launcher needs."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# The interpreter takes its time by the operation, whatever a block's size.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device; a no-op for CPU tensors, which the interpreter takes."""
    return torch.cuda.device_of(tensor)
