"""Labels and confidences where the network's pixels are."""

from __future__ import annotations

import torch
from torch import Tensor


def at_resolution(full: Tensor, size: torch.Size) -> Tensor:
    """[B, H, W] -> [B, h, w]: the value at the pixel nearest to each aligned-corner position."""
    rows = torch.linspace(0, full.shape[-2] - 1, size[0], device=full.device).round().long()
    columns = torch.linspace(0, full.shape[-1] - 1, size[1], device=full.device).round().long()
    return full[:, rows[:, None], columns]
