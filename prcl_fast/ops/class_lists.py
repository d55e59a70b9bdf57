"""Class lists: the pixels of each class as ranges of one list, made once a step and read by several ops."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prcl_fast.ops.arguments import BOOL, INTEGER, check_count, check_pixels, check_tensor, contiguous
from prcl_fast.ops.registry import define_op
from prcl_fast.reference import class_lists as reference


@dataclass(frozen=True)
class ClassLists:
    """Pixels sorted by class, ascending within a class: class c owns order[start[c] : start[c + 1]].

    P is the number of pixels, B*h*w. Behind the last class an order is -1.

    Attributes:
        valid_order: [P] int32, flat indices of the valid pixels.
        valid_start: [C + 1] int32.
        hard_order: [P] int32, likewise of the valid pixels that are hard.
        hard_start: [C + 1] int32.
    """

    valid_order: Tensor
    valid_start: Tensor
    hard_order: Tensor
    hard_start: Tensor

    def with_all_hard(self) -> ClassLists:
        """The lists where every valid pixel is hard."""
        return replace(self, hard_order=self.valid_order, hard_start=self.valid_start)


def class_lists(label: Tensor, valid: Tensor, hard: Tensor, num_classes: int) -> ClassLists:
    """Sorts the valid pixels, and those of them that are hard, by class.

    Args:
        label: [B, h, w] integer; outside 0 .. num_classes - 1 means "none".
        valid: [B, h, w] bool.
        hard: [B, h, w] bool.
        num_classes: C.
    Returns:
        both lists, the same bits on every backend.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.
    """
    check_tensor("label", label, ("B", "h", "w"), INTEGER)
    check_tensor("valid", valid, label.shape, BOOL, ("label", label))
    check_tensor("hard", hard, label.shape, BOOL, ("label", label))
    check_pixels("label", label.numel())
    check_count("num_classes", num_classes)
    return ClassLists(*_op(label, valid, hard, num_classes))


def check_lists(lists: ClassLists, label: Tensor, num_classes: int) -> None:
    """Raises TypeError or ValueError where the lists cannot belong to `label` and `num_classes`."""
    if not isinstance(lists, ClassLists):
        raise TypeError(f"lists must be ClassLists; got {type(lists).__name__}")
    for name in ("valid", "hard"):
        order, start = getattr(lists, f"{name}_order"), getattr(lists, f"{name}_start")
        check_tensor(f"lists.{name}_order", order, (label.numel(),), (torch.int32,), ("label", label))
        check_tensor(f"lists.{name}_start", start, (num_classes + 1,), (torch.int32,), ("label", label))


def _fake(label: Tensor, valid: Tensor, hard: Tensor, num_classes: int) -> tuple[Tensor, ...]:
    pixels, classes = (
        [label.new_empty((size,), dtype=torch.int32) for _ in range(2)]
        for size in (label.numel(), num_classes + 1)
    )
    return pixels[0], classes[0], pixels[1], classes[1]


_op = define_op(reference.class_lists, fake=_fake, prepared=contiguous)
