"""Anchors: hard pixels drawn from each class."""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.ops.arguments import (
    BOOL,
    INTEGER,
    check_count,
    check_draws,
    check_pixels,
    check_seed,
    check_tensor,
    contiguous,
)
from prcl_fast.ops.class_lists import ClassLists, check_lists, class_lists
from prcl_fast.ops.registry import define_op
from prcl_fast.reference import sample_anchors as reference


def sample_anchors(
    label: Tensor,
    valid: Tensor,
    hard: Tensor,
    num_classes: int,
    num_anchors: int,
    seed: Tensor,
    *,
    lists: ClassLists | None = None,
) -> Tensor:
    """Draws each class's anchors uniformly, with replacement, from its valid and hard pixels.

    The draws are a function of the arguments alone and equal, bit for bit, on every backend (rules:
    `prcl_fast.reference.sample_anchors`).

    Args:
        label: [B, h, w] integer; outside 0 .. num_classes - 1 means "none".
        valid: [B, h, w] bool.
        hard: [B, h, w] bool.
        num_classes: C.
        num_anchors: A, per class; C * A < 2^32.
        seed: int64 [2] = (seed, step), on label's device.
        lists: `class_lists` of the same label, valid, hard and num_classes, so that nothing is sorted again.
    Returns:
        [C, A] int64, flat indices into B*h*w, -1 where the class has no valid and hard pixel.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.
    """
    check_tensor("label", label, ("B", "h", "w"), INTEGER)
    check_tensor("valid", valid, label.shape, BOOL, ("label", label))
    check_tensor("hard", hard, label.shape, BOOL, ("label", label))
    check_pixels("label", label.numel())
    check_count("num_classes", num_classes)
    check_count("num_anchors", num_anchors)
    check_draws("num_classes * num_anchors", num_classes * num_anchors)
    check_seed(seed, ("label", label))
    if lists is None:
        lists = class_lists(label, valid, hard, num_classes)
    else:
        check_lists(lists, label, num_classes)
    return _op(lists.hard_order, lists.hard_start, num_anchors, seed)


def _fake(order: Tensor, start: Tensor, num_anchors: int, *_: Tensor) -> Tensor:
    return order.new_empty((start.numel() - 1, num_anchors), dtype=torch.int64)


_op = define_op(reference.sample_anchors, fake=_fake, prepared=contiguous)
