"""Anchors: pixels of a class drawn uniformly, with replacement, from its valid and hard ones."""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.reference.class_lists import class_lists
from prcl_fast.reference.philox import Purpose, bounded, philox_words


def sample_anchors(
    label: Tensor, valid: Tensor, hard: Tensor, num_classes: int, num_anchors: int, seed: Tensor
) -> Tensor:
    """[C, A] int64 flat indices into [B, h, w], -1 where the class has no valid and hard pixel."""
    order, start, count = class_lists(label, valid & hard, num_classes)
    element = torch.arange(num_classes * num_anchors, device=label.device).view(num_classes, num_anchors)
    w0, w1, _, _ = philox_words(seed, element, Purpose.ANCHORS)
    position = start[:, None] + bounded(w0, w1, count[:, None])
    drawn = order[position.clamp(max=order.numel() - 1)]
    return torch.where(count[:, None] > 0, drawn, -1)
