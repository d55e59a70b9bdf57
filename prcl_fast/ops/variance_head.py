"""The probability head's tail: batch norm without affine part, gain, bias and floored sigmoid.

The public function is made of four registered ops, because with batch norm over several ranks a
collective stands between the passes over x: the moments, sigma^2, and in the backward pass the two sums of
each channel and the gradient of x. Of tensors of x's size, only x is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prcl_fast.memory_format import memory_format_of
from prcl_fast.ops.arguments import FLOATING, check_pixels, check_tensor, contiguous, rows_of
from prcl_fast.ops.registry import define_op
from prcl_fast.reference import variance_head as reference


@dataclass(frozen=True)
class Collectives:
    """Collectives that turn the statistics of several ranks into those of their joined batch.

    Attributes:
        merged_moments: (mean [D], biased variance [D], pixels) of this rank -> the same three over the pixels
            of all ranks, the last one as a scalar tensor.
        summed: values -> their sum over all ranks; it may work in place.
    """

    merged_moments: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    summed: Callable[[Tensor], Tensor]


def variance_head(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    collectives: Collectives | None = None,
) -> Tensor:
    """Variance sigma^2 of each pixel's Gaussian from the output of the head's second linear layer.

        xhat = (x - mean) / sqrt(var + eps),  z = gamma * xhat + beta,  sigma^2 = sigmoid(log(e^z + 1e-6))

    The layers are those of [AAAI] and [IJCV], network structure; batch norm without affine part, gain, bias
    and floored sigmoid are those of the authors' public code. In training mean and biased variance are those
    of each channel of the batch, and gradients flow through them to x; the running statistics follow them in
    place, as in `torch.nn.BatchNorm2d`, the variance unbiased. In evaluation the running ones are taken.
    There is no second derivative.

    Args:
        x: [B, D, h, w] float32, bfloat16, float16 or float64, any memory format; channels_last is the fast
            one. Computed in float32, in float64 for float64.
        gamma, beta: [1] floating, gain and bias.
        running_mean, running_var: [D] floating.
        training: whether the batch's statistics are taken.
        momentum: the weight of the batch in the running statistics.
        eps: added to the variance.
        dtype: of the result, float32 (float64 for float64 x) or that of x; None for the first.
        collectives: for statistics over several ranks, each of which must then call this function and its
            backward pass; None for the statistics of this rank alone.
    Returns:
        [B, D, h, w], between 1e-6 and 1, contiguous if x is and else channels_last.
    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the message names
            it.
    """
    check_tensor("x", x, ("B", "D", "h", "w"), FLOATING)
    check_pixels("x", x.shape[0] * x.shape[2] * x.shape[3])
    dims, count = x.shape[1], x.shape[0] * x.shape[2] * x.shape[3]
    if dims == 0:
        raise ValueError(f"x must have at least one channel; got shape {list(x.shape)}")
    for name, value, size in (
        ("gamma", gamma, 1),
        ("beta", beta, 1),
        ("running_mean", running_mean, dims),
        ("running_var", running_var, dims),
    ):
        check_tensor(name, value, (size,), FLOATING, ("x", x))
    work = torch.promote_types(x.dtype, torch.float32)
    if dtype not in (None, work, x.dtype):
        raise TypeError(f"dtype must be {work} or that of x, {x.dtype}; got {dtype}")
    gamma, beta = gamma.to(work), beta.to(work)
    dtype = dtype or work
    if not training:
        y: Tensor = _Tail.apply(
            x, gamma, beta, running_mean.to(work), running_var.to(work), None, eps, dtype, None
        )
        return y
    if collectives is None and count == 1:
        raise ValueError("x must hold more than one pixel in training; got one")
    mean, var = _moments_op(x.detach())
    pixels: Tensor | int = count
    if collectives is not None:
        mean, var, pixels = collectives.merged_moments(mean, var, count)
    with torch.no_grad():
        unbiased = var * (pixels / (pixels - 1))
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    summed = None if collectives is None else collectives.summed
    y = _Tail.apply(x, gamma, beta, mean.to(work), var.to(work), pixels, eps, dtype, summed)
    return y


class _Tail(torch.autograd.Function):
    """sigma^2; `pixels` is the number of pixels behind mean and var, None where these are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        var: Tensor,
        pixels: Tensor | int | None,
        eps: float,
        dtype: torch.dtype,
        summed: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        is_tensor = isinstance(pixels, Tensor)
        ctx.save_for_backward(x, gamma, beta, mean, var, *([pixels] if is_tensor else []))
        ctx.pixels, ctx.eps, ctx.summed = None if is_tensor else pixels, eps, summed
        y: Tensor = _op(x, mean, var, gamma, beta, eps, dtype)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, mean, var, *counted = ctx.saved_tensors
        pixels = counted[0] if counted else ctx.pixels
        sums = _backward_sums_op(grad, x, mean, var, gamma, beta, ctx.eps)
        grad_beta, grad_gamma = sums.sum(1, keepdim=True).unbind()
        grad_x = None
        if ctx.needs_input_grad[0]:
            means = None
            if pixels is not None:
                means = (sums if ctx.summed is None else ctx.summed(sums)) / pixels
            grad_x = _backward_op(grad, x, mean, var, gamma, beta, means, ctx.eps)
        return grad_x, grad_gamma, grad_beta, None, None, None, None, None, None


def _fake_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, torch.empty_like(mean)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    dtype = arguments[-1]
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=memory_format_of(x))


def _fake_backward_sums(grad: Tensor, x: Tensor, mean: Tensor, *_: Any) -> Tensor:
    return mean.new_empty(2, x.shape[1])


def _fake_backward(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def _prepared(*arguments: Any) -> list[Any]:
    """Maps as rows [B*h*w, D], everything else contiguous."""
    return contiguous(
        *(rows_of(value) if isinstance(value, Tensor) and value.dim() == 4 else value for value in arguments)
    )


def _image(rows: Tensor, x: Tensor, *_: Any) -> Tensor:
    """Rows back into x's shape and memory format."""
    batch, dims, height, width = x.shape
    image = rows.view(batch, height, width, dims).permute(0, 3, 1, 2)
    return image.contiguous(memory_format=memory_format_of(x))


def _image_of_backward(rows: Tensor, grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return _image(rows, x)


_moments_op = define_op(reference.variance_head_moments, fake=_fake_moments, prepared=_prepared)
_op = define_op(reference.variance_head, fake=_fake, prepared=_prepared, finished=_image)
_backward_sums_op = define_op(
    reference.variance_head_backward_sums, fake=_fake_backward_sums, prepared=_prepared
)
_backward_op = define_op(
    reference.variance_head_backward,
    fake=_fake_backward,
    prepared=_prepared,
    finished=_image_of_backward,
)
