"""Cross-entropy at image size from logits at feature size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prcl_fast.memory_format import memory_format_of
from prcl_fast.ops.arguments import (
    FLOATING,
    check_count,
    check_pixels,
    check_tensor,
    reduction_is_mean,
)
from prcl_fast.ops.registry import define_op
from prcl_fast.reference import upsample_cross_entropy as reference


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of upsampled logits, eq. (13) and, with a weight, (14) of the IJCV paper.

    Upsampling is bilinear with aligned corners. "sum" adds weight * loss over the pixels that are not
    ignored; "mean" divides that by the number of these pixels, not by the sum of their weights. Where all are
    ignored the loss is a 0 that stays in the graph.

    Args:
        logits: [B, C, h, w] floating; the only argument that gets a gradient. Computed in float32 at least.
        target: [B, H, W] uint8 or int64, class or `ignore_index`. Values are not checked here, which would
            stall the device: any other value is undefined behaviour.
        weight: [B] or [B, H, W] floating, a constant factor of each pixel's loss, or None.
        ignore_index: target value of the pixels left out.
        reduction: "mean" or "sum".
    Returns:
        scalar, float32 (float64 for float64 logits).
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.
    """
    check_tensor("logits", logits, ("B", "C", "h", "w"), FLOATING)
    check_pixels("logits", logits.shape[0] * logits.shape[2] * logits.shape[3])
    check_count("logits.shape[1]", logits.shape[1])
    check_tensor(
        "target", target, (logits.shape[0], "H", "W"), (torch.uint8, torch.int64), ("logits", logits)
    )
    check_pixels("target", target.numel())
    if weight is not None:
        shape = target.shape if isinstance(weight, Tensor) and weight.dim() != 1 else target.shape[:1]
        check_tensor("weight", weight, shape, FLOATING, ("logits", logits))
        weight = weight.detach()
    mean = reduction_is_mean(reduction)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    return _op(logits, target, weight, ignore_index, mean, needs_grad)[0]


def _fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    needs_grad = arguments[-1]
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((), dtype=work), logits.new_empty(
        logits.shape if needs_grad else (0,), dtype=work
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    logits = inputs[0]
    ctx.dtype, ctx.memory_format = logits.dtype, memory_format_of(logits)


def _backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (grad_logits,) = ctx.saved_tensors
    grad = (grad_logits * grad_loss).to(ctx.dtype, memory_format=ctx.memory_format)
    return grad, None, None, None, None, None


def _prepared(
    logits: Tensor, target: Tensor, weight: Tensor | None, *options: int | bool
) -> tuple[Tensor | int | bool | None, ...]:
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits, target.contiguous(), None if weight is None else weight.to(work).contiguous(), *options


_op = define_op(
    reference.upsample_cross_entropy,
    fake=_fake,
    prepared=_prepared,
    backward=_backward,
    setup_context=_setup_context,
)
