"""Pseudo-labels from the teacher's logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prcl_fast.ops.arguments import FLOATING, check_count, check_pixels, check_tensor
from prcl_fast.ops.registry import define_op
from prcl_fast.reference import pseudo_label as reference

MAX_CLASSES = 256  # labels are uint8


def pseudo_label(logits: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Argmax and maximum of the softmax of upsampled logits, eq. (1) of the IJCV paper.

    Upsampling is bilinear with aligned corners. The result carries no gradient.

    Args:
        logits: [B, C, h, w] floating, C <= 256; computed in float32.
        size: (H, W) of the result.
    Returns:
        label uint8 [B, H, W], the first class where two are equal, and confidence float32 [B, H, W].
    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range; the message names it.
    """
    check_tensor("logits", logits, ("B", "C", "h", "w"), FLOATING)
    check_pixels("logits", logits.shape[0] * logits.shape[2] * logits.shape[3])
    if not 1 <= logits.shape[1] <= MAX_CLASSES:
        raise ValueError(f"logits must have between 1 and {MAX_CLASSES} classes; got {logits.shape[1]}")
    if len(size) != 2:
        raise ValueError(f"size must be (H, W); got {tuple(size)}")
    height, width = size
    check_count("size", height)
    check_count("size", width)
    check_pixels("size", height * width)
    return _op(logits.detach(), height, width)


def _fake(logits: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    label = logits.new_empty((logits.shape[0], height, width), dtype=torch.uint8)
    return label, torch.empty_like(label, dtype=torch.float32)


_op = define_op(reference.pseudo_label, fake=_fake)
