"""Memory format of a map's results and gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last, unless x [B, C, h, w] is contiguous and not channels_last."""
    rows = x.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if x.is_contiguous() and not rows else torch.channels_last
