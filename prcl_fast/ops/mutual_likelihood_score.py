"""Mutual likelihood score of every pair of two sets of Gaussians."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize as l2_normalize

from prcl_fast.ops.arguments import FLOATING, check_tensor, reduction_is_mean
from prcl_fast.ops.registry import define_op
from prcl_fast.reference import mutual_likelihood_score as reference


def mutual_likelihood_score(
    mu_a: Tensor,
    var_a: Tensor,
    mu_b: Tensor,
    var_b: Tensor,
    *,
    reduction: str = "sum",
    normalize: bool = False,
) -> Tensor:
    """Log-likelihood that two Gaussians share their latent point, for every pair; eq. (3) of the IJCV paper.

        MLS(i, j) = -1/2 sum_l [(mu_i - mu_j)^2 / (s_i + s_j) + log(s_i + s_j)] - D/2 log 2 pi

    Gradients flow to all four arguments. The sum s_i + s_j is clamped at 1e-12, with no gradient to the
    variances where it was.

    Args:
        mu_a: [..., M, D] means, float32, bfloat16, float16 or float64.
        var_a: [..., M, D] variances s = sigma^2, from 0 to 1e18, or infinite: the score is minus infinity.
        mu_b: [..., N, D].
        var_b: [..., N, D].
        reduction: "sum", or "mean": divided by D and without the constant.
        normalize: L2-normalise mu_a and mu_b over D first, norms clamped at 1e-12; gradients flow through it.
    Returns:
        [..., M, N] float32, or float64 where an argument is float64. Leading dimensions of all arguments must
        be equal.
    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the message names
            it.
    """
    # Casts and normalisation stay around the registered op: they cost [M + N, D] against its [M, N, D].
    mean = reduction_is_mean(reduction)
    if not isinstance(mu_a, Tensor) or mu_a.dim() < 2:
        raise ValueError("mu_a must be a tensor of shape [..., M, D]")
    batch = tuple(mu_a.shape[:-2])
    dims = mu_a.shape[-1]
    if dims == 0:
        raise ValueError(f"mu_a must have at least one dimension D; got shape {list(mu_a.shape)}")
    check_tensor("mu_a", mu_a, (*batch, "M", dims), FLOATING)
    check_tensor("var_a", var_a, tuple(mu_a.shape), FLOATING, ("mu_a", mu_a))
    check_tensor("mu_b", mu_b, (*batch, "N", dims), FLOATING, ("mu_a", mu_a))
    check_tensor("var_b", var_b, tuple(mu_b.shape), FLOATING, ("mu_a", mu_a))

    values = (mu_a, var_a, mu_b, var_b)
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
    mu_a, var_a, mu_b, var_b = (
        value.to(dtype).reshape(math.prod(batch), *value.shape[-2:]) for value in values
    )
    if normalize:
        mu_a, mu_b = l2_normalize(mu_a, dim=-1, eps=1e-12), l2_normalize(mu_b, dim=-1, eps=1e-12)
    score = _op(mu_a, var_a, mu_b, var_b, mean)
    return score.reshape(*batch, *score.shape[-2:])


def _fake(mu_a: Tensor, var_a: Tensor, mu_b: Tensor, *_: Any) -> Tensor:
    return mu_a.new_empty(mu_a.shape[0], mu_a.shape[1], mu_b.shape[1])


def _fake_backward(
    grad: Tensor, mu_a: Tensor, var_a: Tensor, mu_b: Tensor, var_b: Tensor, *options: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, need_a, need_b = options
    side_a = [mu_a.new_empty(mu_a.shape if need_a else (0,)) for _ in range(2)]
    side_b = [mu_a.new_empty(mu_b.shape if need_b else (0,)) for _ in range(2)]
    return side_a[0], side_a[1], side_b[0], side_b[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.mean = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_a = any(ctx.needs_input_grad[:2])
    need_b = any(ctx.needs_input_grad[2:4])
    grads = _backward_op(grad, *ctx.saved_tensors, ctx.mean, need_a, need_b)
    return *(value if need else None for value, need in zip(grads, ctx.needs_input_grad, strict=False)), None


_DTYPES = (torch.float32, torch.float64)  # what the public function passes on
_op = define_op(
    reference.mutual_likelihood_score,
    fake=_fake,
    kernel_dtypes=_DTYPES,
    backward=_backward,
    setup_context=_setup_context,
)
_backward_op = define_op(
    reference.mutual_likelihood_score_backward, fake=_fake_backward, kernel_dtypes=_DTYPES
)
