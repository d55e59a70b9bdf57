"""The contrast in vectorised PyTorch: no loop over classes, no host synchronisation, gradients by autograd.

It holds several [C, A, N, D] tensors. `torch.compile` compiles the same functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ops.baselines import SETTINGS, Settings, negative_classes, pixel_rows, score
from prcl_fast.ops import PrototypeStatistics, Purpose
from prcl_fast.reference.class_lists import class_lists
from prcl_fast.reference.philox_normal import philox_normal
from prcl_fast.reference.sample_anchors import sample_anchors
from prcl_fast.reference.sample_negatives import sample_negatives


def eager_statistics(
    mu: Tensor, var: Tensor, label: Tensor, valid: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, weighted mean [C, D] and count [C] by a product with the one-hot matrix, in float32."""
    member = (label.flatten() == torch.arange(num_classes, device=label.device)[:, None]) & valid.flatten()
    weight = member.float()
    precision = pixel_rows(var).reciprocal()
    return weight @ precision, weight @ (precision * pixel_rows(mu)), member.sum(1)


def eager_loss(
    mu: Tensor,
    var: Tensor,
    anchor_index: Tensor,  # [C, A]
    negative_index: Tensor,  # [C, G, N], G divides A
    positive: PrototypeStatistics,
    virtual_mu: Tensor | None,  # [C, V, D]
    settings: Settings = SETTINGS,
) -> Tensor:
    """Eq. (15) for all anchors at once; needs at least two classes present."""
    num_classes, num_anchors = anchor_index.shape
    mu_rows, var_rows = pixel_rows(mu), pixel_rows(var)
    positive_mean, present = positive.mean, positive.count > 0
    positive_variance = torch.where(present[:, None], positive.variance, 1.0)
    if settings.normalize:
        mu_rows, positive_mean = F.normalize(mu_rows, dim=1), F.normalize(positive_mean, dim=1)
        virtual_mu = None if virtual_mu is None else F.normalize(virtual_mu, dim=2)
    drawn = (anchor_index >= 0) & present[:, None]
    pixel = anchor_index.clamp(min=0)
    anchor_mu, anchor_var = mu_rows[pixel][:, :, None], var_rows[pixel][:, :, None]  # [C, A, 1, D]
    scores = [
        score(anchor_mu, anchor_var, positive_mean[:, None, None], positive_variance[:, None, None], settings)
    ]
    negatives = negative_index.repeat_interleave(num_anchors // negative_index.shape[1], dim=1)
    other = negatives.clamp(min=0)
    between = score(anchor_mu, anchor_var, mu_rows.detach()[other], var_rows.detach()[other], settings)
    scores.append(between.masked_fill(negatives < 0, -torch.inf))
    if virtual_mu is not None:
        rows = virtual_mu.flatten(0, 1)
        of_class = torch.arange(num_classes, device=mu.device).repeat_interleave(virtual_mu.shape[1])
        usable = (of_class != torch.arange(num_classes, device=mu.device)[:, None]) & present[of_class]
        virtual = score(anchor_mu, anchor_var, rows, torch.zeros_like(rows), settings)
        scores.append(virtual.masked_fill(~usable[:, None], -torch.inf))
    logits = torch.cat(scores, dim=2) / settings.tau
    losses = torch.where(drawn, logits.logsumexp(2) - logits[:, :, 0], 0.0)
    return (losses.sum(1) / drawn.sum(1).clamp(min=1)).sum() / present.sum()


def eager_contrast(
    mu: Tensor,
    var: Tensor,
    label: Tensor,
    valid: Tensor,
    confidence: Tensor,
    seed: Tensor | None,
    num_classes: int,
    num_anchors: int,
    num_negatives: int,
    num_virtual: int,
    settings: Settings = SETTINGS,
) -> Tensor:
    """The whole contrast of a batch, with the package's draws, or PyTorch's own where `seed` is None."""
    with torch.no_grad():
        statistics = PrototypeStatistics(*eager_statistics(mu, var, label, valid, num_classes))
        mean, variance = statistics.mean, statistics.variance
        hard = valid & (confidence < settings.delta_s)
        probability = negative_classes(mean, variance, settings)
        shape = (num_classes, num_virtual, mu.shape[1])
        if seed is None:
            anchors = random_anchors(label, hard, num_classes, num_anchors)
            negatives = random_negatives(probability, label, valid, num_anchors, num_negatives)
            noise = torch.randn(shape, device=mu.device)
        else:
            valid_order, valid_start, *of_hard = class_lists(label, valid, hard, num_classes)
            anchors = sample_anchors(*of_hard, num_anchors, seed)
            negatives = sample_negatives(
                probability, valid_order, valid_start, num_anchors, num_negatives, seed
            )
            noise = philox_normal(seed, math.prod(shape), Purpose.VIRTUAL_NEGATIVES).reshape(shape)
        virtual_mu = None
        if num_virtual:
            spread = torch.where(statistics.count[:, None] > 0, variance, 0.0)
            virtual_mu = mean[:, None] + settings.beta * noise * spread[:, None]
    return eager_loss(mu, var, anchors, negatives, statistics, virtual_mu, settings)


def random_anchors(label: Tensor, hard: Tensor, num_classes: int, num_anchors: int) -> Tensor:
    """[C, A]: pixels drawn from the hard ones of each class, -1 for a class without any."""
    order, start, count = _pixels_by_class(label, hard, num_classes)
    drawn = torch.rand(num_classes, num_anchors, device=label.device) * count[:, None]
    index = order[(start[:, None] + drawn.long()).clamp(max=len(order) - 1)]
    return index.masked_fill(count[:, None] == 0, -1)


def random_negatives(
    probability: Tensor,  # [C, C]
    label: Tensor,
    valid: Tensor,
    num_anchors: int,
    num_negatives: int,
) -> Tensor:
    """[C, A, N]: a class for each negative, then one of its pixels; -1 if no other class can be drawn."""
    num_classes = len(probability)
    order, start, count = _pixels_by_class(label, valid, num_classes)
    possible = probability.sum(1, keepdim=True) > 0
    # A row of zeros is an error to multinomial.
    weight = torch.where(possible, probability, 1.0)
    classes = torch.multinomial(weight, num_anchors * num_negatives, replacement=True)
    drawn = torch.rand(classes.shape, device=label.device) * count[classes]
    index = order[(start[classes] + drawn.long()).clamp(max=len(order) - 1)]
    return index.masked_fill(~possible, -1).view(num_classes, num_anchors, num_negatives)


def _pixels_by_class(label: Tensor, keep: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """order [P], start [C], count [C]: class c's kept pixels are order[start[c] : start[c] + count[c]]."""
    key = torch.where(keep, label.long(), num_classes).clamp(max=num_classes).flatten()
    ordered, order = key.sort()
    edges = torch.searchsorted(ordered, torch.arange(num_classes + 1, device=label.device))
    return order, edges[:-1], edges.diff()
