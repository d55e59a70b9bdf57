"""Mutual likelihood score, eq. (3) of the IJCV paper, and its gradients in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_VARIANCE = 1e-12  # of the sum s_i + s_j


def mutual_likelihood_score(mu_a: Tensor, var_a: Tensor, mu_b: Tensor, var_b: Tensor, mean: bool) -> Tensor:
    """Score of every pair of rows; holds a [..., M, N, D] tensor.

        MLS(i, j) = -1/2 sum_l [(mu_i - mu_j)^2 / (s_i + s_j) + log(s_i + s_j)] - D/2 log 2 pi

    Args:
        mu_a, var_a: [..., M, D] means and variances s = sigma^2.
        mu_b, var_b: [..., N, D].
        mean: divide the sum by D and drop the constant.
    Returns:
        [..., M, N]. The sum s_i + s_j is clamped at 1e-12.
    """
    mu_i, s_i = mu_a.unsqueeze(-2), var_a.unsqueeze(-2)  # [..., M, 1, D]
    mu_j, s_j = mu_b.unsqueeze(-3), var_b.unsqueeze(-3)  # [..., 1, N, D]
    s = (s_i + s_j).clamp_min(MIN_VARIANCE)
    terms = (mu_i - mu_j).square() / s + s.log()
    if mean:
        return -0.5 * terms.mean(-1)
    return -0.5 * terms.sum(-1) - mu_a.shape[-1] / 2 * math.log(2 * math.pi)


def mutual_likelihood_score_backward(
    grad: Tensor,
    mu_a: Tensor,
    var_a: Tensor,
    mu_b: Tensor,
    var_b: Tensor,
    mean: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four arguments, the scores weighted by `grad` [..., M, N]; [0] for a side not needed.

    With r = 1 / (s_i + s_j) and t = (mu_i - mu_j) r: d/d mu_i = -t, d/d mu_j = t, and (t^2 - r) / 2 for both
    variances, zero where their sum was clamped.
    """
    total = var_a.unsqueeze(-2) + var_b.unsqueeze(-3)  # [..., M, N, D]
    r = total.clamp_min(MIN_VARIANCE).reciprocal()
    t = (mu_a.unsqueeze(-2) - mu_b.unsqueeze(-3)) * r
    weight = grad.unsqueeze(-1) / (mu_a.shape[-1] if mean else 1)
    to_mu = -weight * t
    to_var = torch.where(total < MIN_VARIANCE, 0.0, 0.5 * weight * (t.square() - r))
    side_a = (to_mu.sum(-2), to_var.sum(-2)) if need_a else (grad.new_empty(0), grad.new_empty(0))
    side_b = (-to_mu.sum(-3), to_var.sum(-3)) if need_b else (grad.new_empty(0), grad.new_empty(0))
    return (*side_a, *side_b)
