"""The pixels of each class as ranges of one list."""

from __future__ import annotations

import torch
from torch import Tensor


def class_lists(
    label: Tensor, valid: Tensor, hard: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts the valid pixels, and those of them that are hard, by class, in ascending order within a class.

    Args:
        label: [B, h, w] integer; outside 0 .. num_classes - 1 means "none".
        valid: [B, h, w] bool.
        hard: [B, h, w] bool.
    Returns:
        order [B*h*w] and start [C + 1] of the valid pixels, and both of the hard ones, all int32: class c
        owns order[start[c] : start[c + 1]]; behind the last class the order is -1.
    """
    return *_sorted(label, valid, num_classes), *_sorted(label, valid & hard, num_classes)


def _sorted(label: Tensor, keep: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    label = label.long()
    belongs = keep & (label >= 0) & (label < num_classes)
    key = torch.where(belongs, label, num_classes).to(torch.int32).flatten()
    sorted_key, order = torch.sort(key, stable=True)
    classes = torch.arange(num_classes + 1, dtype=torch.int32, device=label.device)
    start = torch.searchsorted(sorted_key, classes, out_int32=True)
    return torch.where(sorted_key < num_classes, order, -1).to(torch.int32), start
