"""Probabilistic InfoNCE: the contrast of anchors with their prototype and negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prcl_fast.chunked import probabilistic_info_nce as chunked
from prcl_fast.memory_format import memory_format_of
from prcl_fast.ops.arguments import (
    BOOL,
    FLOATING,
    check_count,
    check_features,
    check_tensor,
    contiguous,
    reduction_is_mean,
    rows_of,
)
from prcl_fast.ops.prototype_statistics import PrototypeStatistics
from prcl_fast.ops.registry import define_op
from prcl_fast.reference import probabilistic_info_nce as reference


def probabilistic_info_nce(
    mu: Tensor,
    var: Tensor,
    anchor_index: Tensor,
    negative_index: Tensor,
    positive: PrototypeStatistics,
    virtual_mu: Tensor | None,
    *,
    tau: float,
    reduction: str = "sum",
    normalize: bool = False,
    virtual_var: Tensor | None = None,
    virtual_known: Tensor | None = None,
    class_factor: Tensor | None = None,
    inverse_norm: Tensor | None = None,
) -> Tensor:
    """InfoNCE of each anchor over its class's prototype, its negatives and the virtual negatives, eq. (15).

    Scores are mutual likelihood scores, eq. (3) of the IJCV paper, over tau. A class is present where
    `positive.count` > 0. The loss is the mean over a class's anchors, summed over the classes and divided by
    the number of classes present, those without an anchor included. An anchor without any negative, real or
    virtual, has a loss of exactly 0; so has a batch without anchors, and it stays in the graph. Gradients go
    to mu and var at the anchors alone, and are made in the forward pass; there is no second derivative.

    Args:
        mu: [B, D, h, w] means, float32, bfloat16, float16 or float64, any memory format; computed in float32
            at least.
        var: [B, D, h, w] variances sigma^2 > 0, dtype of mu, or float32 beside bfloat16 or float16.
        anchor_index: [C, A] int64, flat indices into B*h*w, -1 for none.
        negative_index: [C, G, N] int64, likewise; -1 is left out of the log-sum. With G = A each anchor has
            negatives of its own; with fewer, each run of A / G anchors shares a set, which leaves the
            distribution of each anchor's loss unchanged.
        positive: the prototypes of the C classes.
        virtual_mu: [C, V, D] floating, virtual negatives, or None. An anchor of class c is contrasted with
            the rows of the other known classes.
        tau: temperature, > 0.
        reduction: "sum" over the D dimensions or their "mean".
        normalize: whether every mean is L2-normalised inside the score.
        virtual_var: [C, V, D] floating >= 0, the variances of the virtual negatives; None for variance 0, as
            the IJCV paper has it. Ignored without virtual_mu.
        virtual_known: [C] bool, the classes whose rows of virtual_mu take part, present or not: C~_g of eq.
            (15). The rows of the others may hold anything. None: the classes present.
        class_factor: [C] floating >= 0, what the mean over each class's anchors is multiplied by, or None.
        inverse_norm: [B, h, w] 1 / |mu| as `prototype_statistics` returns it, dtype of the loss; with None,
            `normalize` finds the norms itself. Every pixel that is drawn must have counted there, since the
            others have a 0. The gradient to mu is the same either way. Ignored without `normalize`.
    Returns:
        scalar, float32 (float64 for float64 mu).
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.
    """
    check_features(mu, var)
    dim = mu.shape[1]
    check_tensor("anchor_index", anchor_index, ("C", "A"), (torch.int64,), ("mu", mu))
    num_classes, num_anchors = anchor_index.shape
    check_tensor("negative_index", negative_index, (num_classes, "G", "N"), (torch.int64,), ("mu", mu))
    check_count("anchor_index.shape[1]", num_anchors)
    num_groups = negative_index.shape[1]
    if num_groups < 1 or num_anchors % num_groups:
        raise ValueError(
            f"negative_index must have as many groups as divide the {num_anchors} anchors of a class; "
            f"got {num_groups}"
        )
    check_tensor("positive.precision", positive.precision, (num_classes, dim), FLOATING, ("mu", mu))
    check_tensor("positive.weighted_mean", positive.weighted_mean, (num_classes, dim), FLOATING, ("mu", mu))
    check_tensor("positive.count", positive.count, (num_classes,), (torch.int64,), ("mu", mu))
    if virtual_mu is not None:
        check_tensor("virtual_mu", virtual_mu, (num_classes, "V", dim), FLOATING, ("mu", mu))
        virtual_mu = virtual_mu.detach()
        if virtual_var is not None:
            check_tensor("virtual_var", virtual_var, virtual_mu.shape, FLOATING, ("mu", mu))
            virtual_var = virtual_var.detach()
        if virtual_known is None:
            virtual_known = positive.count > 0
        check_tensor("virtual_known", virtual_known, (num_classes,), BOOL, ("mu", mu))
    else:
        virtual_var = virtual_known = None
    if class_factor is not None:
        check_tensor("class_factor", class_factor, (num_classes,), FLOATING, ("mu", mu))
        class_factor = class_factor.detach()
    if inverse_norm is not None:
        work = torch.float64 if mu.dtype == torch.float64 else torch.float32
        check_tensor("inverse_norm", inverse_norm, (mu.shape[0], *mu.shape[2:]), (work,), ("mu", mu))
        inverse_norm = inverse_norm.detach() if normalize else None
    if not tau > 0:
        raise ValueError(f"tau must be positive; got {tau}")
    mean = reduction_is_mean(reduction)
    needs_grad = torch.is_grad_enabled() and (mu.requires_grad or var.requires_grad)
    positive_mean, positive_variance = positive.mean.detach(), positive.variance.detach()
    return _op(
        mu,
        var,
        anchor_index,
        negative_index,
        positive_mean,
        positive_variance,
        positive.count,
        virtual_mu,
        virtual_var,
        virtual_known,
        class_factor,
        inverse_norm,
        tau,
        mean,
        normalize,
        needs_grad,
    )[0]


def _fake(mu: Tensor, var: Tensor, anchor_index: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_grad = arguments[-1]
    work = torch.float64 if mu.dtype == torch.float64 else torch.float32
    rows = mu.new_empty((*anchor_index.shape, mu.shape[1]) if needs_grad else (0,), dtype=work)
    return mu.new_empty((), dtype=work), rows, torch.empty_like(rows)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    mu, var, anchor_index = inputs[:3]
    _, grad_mu_rows, grad_var_rows = output
    ctx.mark_non_differentiable(grad_mu_rows, grad_var_rows)
    ctx.save_for_backward(grad_mu_rows, grad_var_rows, anchor_index)
    # What the gradients must look like, so that mu and var themselves need not be kept.
    ctx.size, ctx.dtypes = mu.shape, (mu.dtype, var.dtype)
    ctx.channels_last = [memory_format_of(x) is torch.channels_last for x in (mu, var)]


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_mu_rows, grad_var_rows, anchor_index = ctx.saved_tensors
    batch, _, height, width = ctx.size
    grad_mu, grad_var = _backward_op(
        grad_loss,
        grad_mu_rows,
        grad_var_rows,
        anchor_index,
        batch,
        height,
        width,
        *ctx.dtypes,
        *ctx.channels_last,
    )
    return grad_mu, grad_var, *[None] * 14


def _backward_fake(
    grad_loss: Tensor,
    grad_mu_rows: Tensor,
    grad_var_rows: Tensor,
    anchor_index: Tensor,
    batch: int,
    height: int,
    width: int,
    mu_dtype: torch.dtype,
    var_dtype: torch.dtype,
    mu_channels_last: bool,
    var_channels_last: bool,
) -> tuple[Tensor, Tensor]:
    grad_mu, grad_var = (
        torch.empty(
            (batch, grad_mu_rows.shape[2], height, width),
            dtype=dtype,
            device=grad_mu_rows.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )
        for dtype, channels_last in ((mu_dtype, mu_channels_last), (var_dtype, var_channels_last))
    )
    return grad_mu, grad_var


def _prepared(mu: Tensor, var: Tensor, *others: Any) -> list[Any]:
    """mu and var as rows [P, D]; other tensors contiguous, floating ones in the dtype of the loss."""
    work = torch.float64 if mu.dtype == torch.float64 else torch.float32
    return contiguous(
        rows_of(mu),
        rows_of(var),
        *(
            value.to(work) if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in others
        ),
    )


def _backward_prepared(grad_loss: Tensor, grad_mu_rows: Tensor, *others: Any) -> list[Any]:
    return contiguous(grad_loss.to(grad_mu_rows.dtype), grad_mu_rows, *others)


_op = define_op(
    reference.probabilistic_info_nce,
    torch_version=chunked.probabilistic_info_nce,
    fake=_fake,
    prepared=_prepared,
    backward=_backward,
    setup_context=_setup_context,
)
_backward_op = define_op(
    reference.probabilistic_info_nce_backward, fake=_backward_fake, prepared=_backward_prepared
)
