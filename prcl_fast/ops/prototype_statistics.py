"""Class prototypes in natural parameters: precision and weighted mean, which add up over sets of pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from prcl_fast.ops.arguments import BOOL, INTEGER, check_count, check_features, check_tensor, contiguous
from prcl_fast.ops.class_lists import ClassLists, check_lists
from prcl_fast.ops.registry import define_op
from prcl_fast.reference import prototype_statistics as reference


@dataclass(frozen=True)
class PrototypeStatistics:
    """Gaussian prototypes of C classes in natural parameters, which add up over sets of pixels.

    Eq. (4) and (9) of the IJCV paper: precisions add, and so do precision-weighted means.

    Attributes:
        precision: [C, D], sum over the class's pixels of 1 / s.
        weighted_mean: [C, D], sum of mu / s.
        count: [C] int64, number of pixels; 0 means the class is absent.
    """

    precision: Tensor
    weighted_mean: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """[C, D]: the prototypes' means, 0 where a class is absent."""
        present = self.count[:, None] > 0
        return torch.where(present, self.weighted_mean / torch.where(present, self.precision, 1.0), 0.0)

    @property
    def variance(self) -> Tensor:
        """[C, D]: the prototypes' variances, infinite where a class is absent."""
        return torch.where(self.count[:, None] > 0, self.precision, 0.0).reciprocal()


@overload
def prototype_statistics(
    mu: Tensor,
    var: Tensor,
    label: Tensor,
    valid: Tensor,
    num_classes: int,
    *,
    lists: ClassLists | None = None,
    with_norms: Literal[False] = False,
) -> PrototypeStatistics: ...


@overload
def prototype_statistics(
    mu: Tensor,
    var: Tensor,
    label: Tensor,
    valid: Tensor,
    num_classes: int,
    *,
    lists: ClassLists | None = None,
    with_norms: Literal[True],
) -> tuple[PrototypeStatistics, Tensor]: ...


def prototype_statistics(
    mu: Tensor,
    var: Tensor,
    label: Tensor,
    valid: Tensor,
    num_classes: int,
    *,
    lists: ClassLists | None = None,
    with_norms: bool = False,
) -> PrototypeStatistics | tuple[PrototypeStatistics, Tensor]:
    """Sums of 1 / s and mu / s over each class's valid pixels, eq. (4) of the IJCV paper.

    The result carries no gradient.

    Args:
        mu: [B, D, h, w] means, float32, bfloat16, float16 or float64, any memory format.
        var: [B, D, h, w] variances sigma^2 > 0, dtype of mu, or float32 beside bfloat16 or float16.
        label: [B, h, w] integer; outside 0 .. num_classes - 1 means "none".
        valid: [B, h, w] bool. What the other pixels hold, even NaN, does not matter.
        num_classes: C.
        lists: `class_lists` of the same label, valid and num_classes, so that nothing is sorted again.
        with_norms: whether the inverse norms of the means are returned too, which costs no further pass.
    Returns:
        precision and weighted mean [C, D] float32, count [C] int64. With norms, beside them 1 / |mu|
        [B, h, w], float32 or float64 where mu is: the norm is clamped at 1e-12, and pixels that do not count
        have a 0.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.
    """
    check_features(mu, var)
    size = (mu.shape[0], *mu.shape[2:])
    check_tensor("label", label, size, INTEGER, ("mu", mu))
    check_tensor("valid", valid, size, BOOL, ("mu", mu))
    check_count("num_classes", num_classes)
    order = start = None
    if lists is not None:
        check_lists(lists, label, num_classes)
        order, start = lists.valid_order, lists.valid_start
    *sums, inverse_norm = _op(mu.detach(), var.detach(), label, valid, num_classes, with_norms, order, start)
    statistics = PrototypeStatistics(*sums)
    return (statistics, inverse_norm) if with_norms else statistics


def _fake(
    mu: Tensor,
    var: Tensor,
    label: Tensor,
    valid: Tensor,
    num_classes: int,
    with_norms: bool,
    *_: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = mu.new_empty((num_classes, mu.shape[1]), dtype=torch.float32)
    count = mu.new_empty((num_classes,), dtype=torch.int64)
    work = torch.float64 if mu.dtype == torch.float64 else torch.float32
    inverse_norm = mu.new_empty(label.shape if with_norms else (0,), dtype=work)
    return table, torch.empty_like(table), count, inverse_norm


def _prepared(mu: Tensor, var: Tensor, *others: Any) -> tuple[Any, ...]:
    """One memory format for mu and var, either of the two; all else contiguous."""
    if not (mu.is_contiguous() and var.is_contiguous()):
        mu, var = (x.contiguous(memory_format=torch.channels_last) for x in (mu, var))
    return mu, var, *contiguous(*others)


_op = define_op(reference.prototype_statistics, fake=_fake, prepared=_prepared)
