"""Normal numbers by Box and Muller: sqrt(-2 log((w0 + 1) / 2^32)) * cos(2 pi w1 / 2^32).

The element of a number is its flat position in the output. Devices agree up to the rounding of log and cos.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prcl_fast.reference.philox import philox_words


def philox_normal(seed: Tensor, count: int, purpose: int) -> Tensor:
    """`count` standard normal numbers, float32, a function of (seed, step, purpose) alone."""
    w0, w1, _, _ = philox_words(seed, torch.arange(count, device=seed.device), purpose)
    radius = torch.sqrt(-2.0 * torch.log((w0 + 1).double() * 2.0**-32))
    return (radius * torch.cos(w1.double() * (2.0 * math.pi * 2.0**-32))).float()
