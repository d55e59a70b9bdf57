"""Probabilistic InfoNCE, eq. (15) with the score of eq. (3) of the IJCV paper, for all anchors at once.

    loss_i = -log softmax_j(MLS(i, j) / tau) at j = the positive

with j over the positive, the negatives and the virtual negatives of anchor i. The loss is the mean over a
class's anchors, summed over the classes and divided by the number of classes present.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.reference.mutual_likelihood_score import MIN_VARIANCE
from prcl_fast.reference.norm import inverse_norm as inverse_norm_of


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
    """Loss, differentiable in mu and var, and its gradients to the anchors' rows of them, [C, A, D] each.

    The gradients are empty unless `needs_grad`. All three are float32, or float64 where mu is. virtual_known,
    [C] bool, is required with virtual_mu; a virtual_var of None is zeros. Holds [C, A, N, D] tensors.
    """
    work = torch.float64 if mu.dtype == torch.float64 else torch.float32
    num_classes, num_anchors = anchor_index.shape
    mu, var = (x.movedim(1, -1).flatten(0, 2).to(work) for x in (mu, var))  # [P, D]

    def unit(means: Tensor, index: Tensor | None = None) -> Tensor:
        """The means as the score takes them, with the value of inverse_norm where `index` is given."""
        if not normalize:
            return means
        norm = inverse_norm_of(means, -1, work)
        if inverse_norm is not None and index is not None:
            norm = norm + (inverse_norm.flatten()[index] - norm).detach()
        return means * norm[..., None]

    # Rows that do not count may hold nan: they are replaced by 0, and their variances by 1, before any use.
    present = positive_count > 0  # [C]
    drawn = (anchor_index >= 0) & present[:, None]  # [C, A]
    mu_row, s_i = (
        torch.where(drawn[..., None], x[anchor_index], fill).requires_grad_(x.requires_grad or needs_grad)
        for x, fill in ((mu, 0.0), (var, 1.0))
    )
    mu_i = unit(mu_row, anchor_index)  # [C, A, D]

    # Candidates, the positive first: means and variances [C, A, K, D], and which of them count [C, A, K].
    index = negative_index.repeat_interleave(num_anchors // negative_index.shape[1], 1)  # [C, A, N]
    groups = [
        [x[:, None, None] for x in (unit(positive_mean.to(work)), positive_variance, present)],
        [unit(mu[index].detach(), index), var[index].detach(), index >= 0],
    ]
    if virtual_mu is not None and virtual_known is not None:
        classes = torch.arange(num_classes, device=mu.device)
        usable = virtual_known & (classes != classes[:, None])  # [C, C]
        values = [
            unit(virtual_mu.to(work)),
            torch.zeros_like(virtual_mu) if virtual_var is None else virtual_var,
        ]
        groups.append(
            [x.flatten(0, 1)[None, None] for x in values]
            + [usable.repeat_interleave(virtual_mu.shape[1], 1)[:, None]]
        )
    mu_j, s_j, counts = (
        torch.cat([part.expand(num_classes, num_anchors, *part.shape[2:]) for part in parts], 2)
        for parts in zip(*groups, strict=True)
    )
    counts = counts & drawn[..., None]
    mu_j, s_j = torch.where(counts[..., None], mu_j, 0.0), torch.where(counts[..., None], s_j.to(work), 1.0)

    s = (s_i[:, :, None] + s_j).clamp(min=MIN_VARIANCE)
    score = -0.5 * ((mu_i[:, :, None] - mu_j).square() / s + s.log()).sum(-1)  # [C, A, K]
    logits = score / (tau * mu.shape[1] if mean else tau)
    counts[..., 0] = True  # the loss of an anchor that is not drawn is multiplied by 0
    losses = logits.masked_fill(~counts, -torch.inf).logsumexp(-1) - logits[..., 0]  # [C, A]
    weight = drawn / (drawn.sum(1, keepdim=True).clamp(min=1) * present.sum().clamp(min=1)).to(work)
    if class_factor is not None:
        weight = weight * class_factor.to(work)[:, None]
    loss = (weight * losses).sum()
    if not needs_grad:
        return loss, loss.new_empty(0), loss.new_empty(0)
    grad_mu, grad_var = torch.autograd.grad(loss, (mu_row, s_i), retain_graph=True)
    return loss, grad_mu, grad_var


def probabilistic_info_nce_backward(
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
    """Adds the anchors' gradient rows, times the incoming gradient, into zeros [B, D, h, w]."""
    index = anchor_index.flatten()
    gradients = []
    for rows, dtype, channels_last in (
        (grad_mu_rows, mu_dtype, mu_channels_last),
        (grad_var_rows, var_dtype, var_channels_last),
    ):
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        rows = torch.where(index[:, None] >= 0, rows.flatten(0, 1) * grad_loss.to(rows.dtype), 0.0)
        full = rows.new_zeros(batch * height * width, rows.shape[1])
        # Each device has one of the two that adds in a fixed order.
        if rows.device.type == "cpu":
            full.index_add_(0, index.clamp(min=0), rows)
        else:
            full.index_put_((index.clamp(min=0),), rows, accumulate=True)
        full = full.view(batch, height, width, -1).permute(0, 3, 1, 2)
        gradients.append(full.to(dtype).contiguous(memory_format=memory_format))
    return gradients[0], gradients[1]
