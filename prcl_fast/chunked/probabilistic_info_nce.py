"""Probabilistic InfoNCE in chunks of anchors: loss and gradients in one pass over [chunk, N, D] tensors.

For anchor i and candidate j, with t = (mu_j - mu_i) r and r = 1 / (s_i + s_j), per dimension:

    score(i, j) = -1/2 sum [(mu_j - mu_i) t + log(s_i + s_j)]
    d score / d mu_i = t            d score / d s_i = (t^2 - r) / 2

so that with w_j = softmax_j(score / tau) - [j is the positive], the gradients of the anchor's loss are sum_j
w_j t / tau and sum_j w_j (t^2 - r) / (2 tau). Nothing is kept for a backward pass but one row per anchor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.reference.mutual_likelihood_score import MIN_VARIANCE
from prcl_fast.reference.norm import MIN_NORM, is_clamped
from prcl_fast.reference.norm import inverse_norm as inverse_norm_of

# Bytes of one [chunk, N, D] tensor. On a CPU a few of them should fit into the cache.
_CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 26}


def probabilistic_info_nce(
    mu: Tensor,
    var: Tensor,
    anchor_index: Tensor,
    negative_index: Tensor,
    positive_mean: Tensor,
    positive_variance: Tensor,
    positive_count: Tensor,
    virtual_mu: Tensor | None,
    virtual_var: Tensor | None,
    virtual_known: Tensor | None,
    class_factor: Tensor | None,
    inverse_norm: Tensor | None,
    tau: float,
    mean: bool,
    normalize: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar) and its gradients to the anchors' rows of mu and var, [C, A, D] each.

    The gradients are empty unless `needs_grad`. All three are float32, or float64 where mu is. virtual_known,
    [C] bool, is required with virtual_mu; a virtual_var of None is zeros.
    """
    num_classes, num_anchors = anchor_index.shape
    dim = mu.shape[1]
    work = torch.float64 if mu.dtype == torch.float64 else torch.float32
    scale = 1.0 / (tau * dim) if mean else 1.0 / tau
    present = positive_count > 0  # [C]
    weight = _anchor_weights(anchor_index, present, class_factor, work).flatten()  # [C*A]

    mu_rows, var_rows = _pixel_rows(mu), _pixel_rows(var)  # [P, D]
    prototype_mu = positive_mean.to(work)
    prototype_var = torch.where(present[:, None], positive_variance.to(work), 1.0)
    if normalize:
        inverse_norm = (
            inverse_norm_of(mu, 1, work) if inverse_norm is None else inverse_norm
        ).flatten()  # [P]
        prototype_mu = _normalized(prototype_mu)
    else:
        inverse_norm = None
    virtual = None
    if virtual_mu is not None and virtual_known is not None:
        virtual = _virtual_rows(virtual_mu.to(work), virtual_var, virtual_known, normalize)

    loss = mu.new_zeros((), dtype=work)
    shape = (num_classes * num_anchors, dim) if needs_grad else (0,)
    grad_mu, grad_var = mu.new_zeros(shape, dtype=work), mu.new_zeros(shape, dtype=work)

    anchors, negatives = anchor_index.flatten(), negative_index.flatten(0, 1)  # [C*A], [C*G, N]
    anchors_per_group = num_anchors // negative_index.shape[1]
    if _is_readable_on_host(mu.device):
        # Classes without anchors need no work; no sum was clamped if the anchors' variances alone are larger.
        used = weight.nonzero()[:, 0]
        may_clamp = bool((var_rows[anchors[used]] <= MIN_VARIANCE).any())
    else:
        used, may_clamp = torch.arange(len(anchors), device=mu.device), True
    candidates = max(negatives.shape[1], 1)
    chunk = max(1, _CHUNK_BYTES.get(mu.device.type, 1 << 26) // (candidates * dim * weight.element_size()))
    for rows in used.split(chunk):
        classes = rows // num_anchors
        pixel = anchors[rows].clamp(min=0)
        anchor_mu, anchor_var = mu_rows[pixel].to(work), var_rows[pixel].to(work)  # [chunk, D]
        if inverse_norm is not None:
            anchor_mu = anchor_mu * inverse_norm[pixel, None]

        groups = [_pairs(anchor_mu, anchor_var, prototype_mu[classes, None], prototype_var[classes, None])]
        drawn = negatives[rows // anchors_per_group]
        kept = drawn >= 0
        # The anchor itself stands in for a negative that is missing: as finite as the rest, and masked below.
        other = torch.where(kept, drawn, pixel[:, None]).flatten()
        other_mu = mu_rows.index_select(0, other).to(work)
        if inverse_norm is not None:
            other_mu *= inverse_norm[other, None]
        other_var = var_rows.index_select(0, other).to(work)
        shape_3d = (*kept.shape, dim)
        groups.append(_pairs(anchor_mu, anchor_var, other_mu.view(shape_3d), other_var.view(shape_3d)))
        scores = [groups[0][0], groups[1][0].masked_fill(~kept, -torch.inf)]
        if virtual is not None:
            rows_mu, rows_var, owner = virtual
            groups.append(_pairs(anchor_mu, anchor_var, rows_mu[None], rows_var[None]))
            usable = (owner >= 0) & (owner != classes[:, None])
            scores.append(groups[2][0].masked_fill(~usable, -torch.inf))

        logits = torch.cat(scores, dim=1) * scale  # the positive first
        row_weight = weight[rows]
        row_loss = torch.logsumexp(logits, dim=1) - logits[:, 0]
        loss += torch.where(row_weight > 0, row_loss * row_weight, 0.0).sum()
        if not needs_grad:
            continue

        w = torch.softmax(logits, dim=1)
        w[:, 0] = -w[:, 1:].sum(1)  # softmax - 1, without the cancellation
        w *= (row_weight * scale)[:, None]
        row_mu, row_var = torch.zeros_like(anchor_mu), torch.zeros_like(anchor_mu)
        # Sums instead of matmuls, which autocast and TF32 would round.
        for (_, t, r), w_group in zip(groups, w.split([g[0].shape[1] for g in groups], dim=1), strict=True):
            row_mu += (w_group[..., None] * t).sum(1)
            slope = t.square_().sub_(r)
            if may_clamp:
                slope.masked_fill_(r >= 1.0 / MIN_VARIANCE, 0.0)
            row_var += slope.mul_(w_group[..., None]).sum(1)
        if inverse_norm is not None:
            # d(mu / |mu|): the part across mu, over |mu|. Below the clamp the norm counts as a constant.
            along = (anchor_mu * row_mu).sum(1, keepdim=True) * anchor_mu
            row_mu -= torch.where(is_clamped(inverse_norm[pixel, None]), 0.0, along)
            row_mu *= inverse_norm[pixel, None]
        counts = row_weight[:, None] > 0
        grad_mu[rows] = torch.where(counts, row_mu, 0.0)
        grad_var[rows] = torch.where(counts, row_var.mul_(0.5), 0.0)
    if not needs_grad:
        return loss, grad_mu, grad_var
    shape_rows = (num_classes, num_anchors, dim)
    return loss, grad_mu.view(shape_rows), grad_var.view(shape_rows)


def _is_readable_on_host(device: torch.device) -> bool:
    """True where the host may read values without stalling the device."""
    return device.type == "cpu"


def _anchor_weights(
    anchor_index: Tensor, present: Tensor, class_factor: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[C, A]: what turns the anchors' losses into the loss."""
    drawn = (anchor_index >= 0) & present[:, None]
    num_present = present.sum()
    share = drawn.to(dtype) / (drawn.sum(1, keepdim=True).clamp(min=1) * num_present.clamp(min=1))
    if class_factor is not None:
        share = share * class_factor.to(dtype)[:, None]
    return share


def _virtual_rows(
    mean: Tensor, variance: Tensor | None, known: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Means and variances [C*V, D] of the virtual negatives and the class of each, -1 where it is unknown."""
    num_classes, number, _ = mean.shape
    # Rows of unknown classes may hold nan, which a weight of 0 does not undo.
    unknown = ~known[:, None, None]
    mean = mean.masked_fill(unknown, 0.0)
    variance = torch.zeros_like(mean) if variance is None else variance.to(mean.dtype)
    variance = variance.masked_fill(unknown, 1.0)
    if normalize:
        mean = _normalized(mean)
    owner = torch.where(known, torch.arange(num_classes, device=mean.device), -1)
    return mean.flatten(0, 1), variance.flatten(0, 1), owner.repeat_interleave(number)


def _pixel_rows(x: Tensor) -> Tensor:
    """[B, D, h, w] -> [B*h*w, D], a view where x is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _normalized(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=MIN_NORM)


def _pairs(
    anchor_mu: Tensor, anchor_var: Tensor, other_mu: Tensor, other_var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Score without constant [chunk, N], t and r [chunk, N, D], for other rows [chunk or 1, N, D]."""
    total = (anchor_var[:, None] + other_var).clamp_(min=MIN_VARIANCE)
    difference = other_mu - anchor_mu[:, None]
    r = total.reciprocal()
    t = difference * r
    score = total.log().addcmul_(difference, t).sum(-1).mul_(-0.5)
    return score, t, r
