"""The pixels of each class as ranges of one list."""

from __future__ import annotations

import torch
from torch import Tensor


def class_lists(label: Tensor, keep: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the kept pixels by class, each class's pixels in ascending flat index order.

    Args:
        label: [B, h, w] integer; outside 0 .. num_classes - 1 means "none".
        keep: [B, h, w] bool.
    Returns:
        order [B*h*w], start [C], count [C], all int64: class c owns order[start[c] : start[c] + count[c]].
    """
    label = label.long()
    belongs = keep & (label >= 0) & (label < num_classes)
    key = torch.where(belongs, label, num_classes).to(torch.int32).flatten()
    sorted_key, order = torch.sort(key, stable=True)
    classes = torch.arange(num_classes + 1, dtype=torch.int32, device=label.device)
    edge = torch.searchsorted(sorted_key, classes)
    return order, edge[:-1], edge.diff()
