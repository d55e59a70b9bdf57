"""Bilinear upsampling of a feature map with a gradient that is the same from run to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prcl_fast.ops.arguments import FLOATING, check_count, check_pixels, check_tensor
from prcl_fast.ops.registry import define_op
from prcl_fast.reference import upsample_bilinear as reference


def upsample_bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    """`torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=True)`, to any size.

        y = A_h x A_w^T,   a_ij = max(0, 1 - |p_i - j|)

    with p_i the position of output i among the inputs j of an axis. Each value of the gradient A_h^T g A_w is
    summed by one owner in a fixed order, so that it has the same bits in every run; PyTorch's own adds
    atomically on CUDA. The gradient can be differentiated again.

    Args:
        x: [B, C, h, w] floating, in any memory format; channels_last is the fast one. Computed in float32,
            float64 for float64.
        size: (H, W) of the result.
    Returns:
        [B, C, H, W] of x's dtype. It and the gradient are channels_last where x's channels lie side by side,
        else contiguous.
    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range; the message names it.
    """
    check_tensor("x", x, ("B", "C", "h", "w"), FLOATING)
    check_pixels("x", x.shape[0] * x.shape[2] * x.shape[3])
    check_count("x.shape[1]", x.shape[1])
    if len(size) != 2:
        raise ValueError(f"size must be (H, W); got {tuple(size)}")
    height, width = size
    check_count("size", height)
    check_count("size", width)
    check_pixels("size", height * width)
    # The second condition tells the two formats of a 1x1 map apart.
    # Not memory_format_of: a slice of channels is read where it lies.
    channels_last = x.stride(1) == 1 and x.stride(3) >= x.shape[1]
    return _op(x, height, width, channels_last)


def _fake(x: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    return torch.empty(
        (x.shape[0], x.shape[1], height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, ctx.channels_last = inputs
    ctx.size = x.shape[2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_op(grad, *ctx.size, ctx.channels_last), None, None, None


def _backward_of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _op(grad, *ctx.size, ctx.channels_last), None, None, None


def _prepared(x: Tensor, height: int, width: int, channels_last: bool) -> tuple[Tensor | int | bool, ...]:
    """For the kernels, channels lie side by side in channels_last, else columns do.

    A slice of the channels, such as the gradient of a concatenation's operand, is read where it lies.
    """
    if x.stride(1 if channels_last else 3) != 1:
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return x, height, width, channels_last


_op = define_op(
    reference.upsample_bilinear,
    fake=_fake,
    prepared=_prepared,
    backward=_backward,
    setup_context=_setup_context,
)
_backward_op = define_op(
    reference.upsample_bilinear_backward,
    fake=_fake,
    prepared=_prepared,
    backward=_backward_of_backward,
    setup_context=_setup_context,
)
