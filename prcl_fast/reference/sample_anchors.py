"""Anchors: pixels of a class drawn uniformly, with replacement, from its valid and hard ones.

The element of draw a of class c is c * A + a, and its index list_c[bounded(w0, w1, n_c)], where list_c holds
the class's n_c valid and hard pixels, as flat indices into [B, h, w], ascending. n_c = 0 gives -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.reference.philox import ANCHORS, bounded, philox_words


def sample_anchors(order: Tensor, start: Tensor, num_anchors: int, seed: Tensor) -> Tensor:
    """[C, A] int64 flat indices from the class lists of the hard pixels, -1 where a class has none."""
    num_classes = start.numel() - 1
    count = start.diff()
    element = torch.arange(num_classes * num_anchors, device=order.device).view(num_classes, num_anchors)
    w0, w1, _, _ = philox_words(seed, element, ANCHORS)
    position = start[:-1, None] + bounded(w0, w1, count[:, None].long())
    drawn = order[position.clamp(max=order.numel() - 1)].long()
    return torch.where(count[:, None] > 0, drawn, -1)
