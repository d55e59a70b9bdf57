"""Negatives: for each anchor, pixels of other classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prcl_fast.ops.arguments import (
    BOOL,
    FLOATING,
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
from prcl_fast.reference import sample_negatives as reference


def sample_negatives(
    class_probability: Tensor,
    label: Tensor,
    valid: Tensor,
    num_classes: int,
    num_anchors: int,
    num_negatives: int,
    seed: Tensor,
    *,
    lists: ClassLists | None = None,
) -> Tensor:
    """Draws each negative's class from the anchor class's row, then one of that class's valid pixels.

    The draws are a function of the arguments alone and equal, bit for bit, on every backend (rules:
    `prcl_fast.reference.sample_negatives`).

    Args:
        class_probability: [C, C] floating; row c is a distribution over the other classes. The diagonal, and
            classes without a valid pixel, count as 0; the rest of the row need not sum to one, but beyond one
            it is cut.
        label: [B, h, w] integer; outside 0 .. num_classes - 1 means "none".
        valid: [B, h, w] bool.
        num_classes: C.
        num_anchors: A, per class.
        num_negatives: N, per anchor; C * A * N < 2^32.
        seed: int64 [2] = (seed, step), on label's device.
        lists: `class_lists` of the same label, valid and num_classes, so that nothing is sorted again.
    Returns:
        [C, A, N] int64, flat indices into B*h*w, -1 where no other class can be drawn.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.
    """
    check_tensor("label", label, ("B", "h", "w"), INTEGER)
    check_tensor("valid", valid, label.shape, BOOL, ("label", label))
    check_pixels("label", label.numel())
    check_count("num_classes", num_classes)
    check_count("num_anchors", num_anchors)
    check_count("num_negatives", num_negatives)
    check_draws("num_classes * num_anchors * num_negatives", num_classes * num_anchors * num_negatives)
    check_tensor(
        "class_probability", class_probability, (num_classes, num_classes), FLOATING, ("label", label)
    )
    check_seed(seed, ("label", label))
    if lists is None:
        lists = class_lists(label, valid, valid, num_classes)
    else:
        check_lists(lists, label, num_classes)
    return _op(
        class_probability.detach(), lists.valid_order, lists.valid_start, num_anchors, num_negatives, seed
    )


def _fake(
    class_probability: Tensor, order: Tensor, start: Tensor, num_anchors: int, num_negatives: int, *_: Tensor
) -> Tensor:
    return order.new_empty((class_probability.shape[0], num_anchors, num_negatives), dtype=torch.int64)


def _prepared(class_probability: Tensor, *others: Any) -> list[Any]:
    return contiguous(class_probability.double(), *others)


_op = define_op(reference.sample_negatives, fake=_fake, prepared=_prepared, kernel_dtypes=FLOATING)
