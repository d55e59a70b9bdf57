"""The published contrast, written from its description: the baseline of the benchmarks.

A Python loop over classes, prototypes by masked sums, a sampler on the host that draws the pixels of each
anchor class by class, a gather of [A, N, D] negatives for every class, and an autograd graph that keeps them
all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Settings:
    """Settings of the contrast, chosen so that with random features many negatives contribute to the loss."""

    tau: float = 0.1
    reduction: str = "mean"
    normalize: bool = True
    beta: float = 1.0
    delta_s: float = 0.8


SETTINGS = Settings()


def score(mu_a: Tensor, var_a: Tensor, mu_b: Tensor, var_b: Tensor, settings: Settings = SETTINGS) -> Tensor:
    """Eq. (3) of the IJCV paper over the last dimension of operands that broadcast together."""
    total = (var_a + var_b).clamp(min=1e-12)
    terms = (mu_a - mu_b).square() / total + total.log()
    if settings.reduction == "mean":
        return -0.5 * terms.mean(-1)
    return -0.5 * terms.sum(-1) - mu_a.shape[-1] / 2 * math.log(2 * math.pi)


def pixel_rows(x: Tensor) -> Tensor:
    """[B, D, h, w] -> [B*h*w, D] float32."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).float()


def loop_prototypes(mu: Tensor, var: Tensor, label: Tensor, valid: Tensor, num_classes: int) -> list[Tensor]:
    """Mean and variance of each class, [C, D], by masked sums, eq. (4); variance infinite where absent."""
    means, variances = [], []
    mu_rows, var_rows = pixel_rows(mu.detach()), pixel_rows(var.detach())
    for number in range(num_classes):
        member = (valid & (label == number)).flatten()
        if not member.any():
            means.append(mu_rows.new_zeros(mu.shape[1]))
            variances.append(mu_rows.new_full((mu.shape[1],), torch.inf))
            continue
        precision = 1.0 / var_rows[member]
        variance = 1.0 / precision.sum(0)
        means.append(variance * (precision * mu_rows[member]).sum(0))
        variances.append(variance)
    return [torch.stack(means), torch.stack(variances)]


def loop_anchors(label: Tensor, hard: Tensor, num_classes: int, num_anchors: int) -> Tensor:
    """[C, A]: pixels drawn from the hard ones of each class, -1 for a class without any."""
    index = torch.full((num_classes, num_anchors), -1, device=label.device)
    for number in range(num_classes):
        pixels = (hard & (label == number)).flatten().nonzero()[:, 0]
        if len(pixels):
            index[number] = pixels[torch.randint(len(pixels), (num_anchors,), device=label.device)]
    return index


def loop_negatives(
    probability: Tensor,  # [C, C]
    label: Tensor,
    valid: Tensor,
    num_anchors: int,
    num_negatives: int,
    generator: np.random.Generator,
) -> Tensor:
    """[C, A, N]: for each anchor the number of negatives of every class, then their pixels, on the host."""
    num_classes = len(probability)
    pools = [(valid & (label == number)).flatten().nonzero()[:, 0] for number in range(num_classes)]
    sizes = [len(pool) for pool in pools]
    first = np.cumsum([0, *sizes[:-1]])
    pool = torch.cat(pools)
    index = torch.full((num_classes, num_anchors, num_negatives), -1, device=label.device)
    for number in range(num_classes):
        if not probability[number].sum() > 0:
            continue
        drawn = torch.multinomial(probability[number], num_anchors * num_negatives, replacement=True)
        classes = drawn.view(num_anchors, num_negatives).cpu().numpy()
        positions: list[list[int]] = []
        for anchor in range(num_anchors):
            own: list[int] = []
            for other, amount in enumerate(np.bincount(classes[anchor], minlength=num_classes)):
                if amount:
                    low = first[other]
                    own += generator.integers(low, low + sizes[other], amount).tolist()
            positions.append(own)
        index[number] = pool[torch.tensor(positions, device=label.device)]
    return index


def loop_loss(
    mu: Tensor,
    var: Tensor,
    anchor_index: Tensor,  # [C, A]
    negative_index: Tensor,  # [C, A, N]
    positive_mean: Tensor,  # [C, D]
    positive_variance: Tensor,  # [C, D], infinite where a class is absent
    virtual_mu: Tensor | None,  # [C, V, D]
    settings: Settings = SETTINGS,
) -> Tensor:
    """Eq. (15), one class after the other."""
    mu_rows, var_rows = pixel_rows(mu), pixel_rows(var)
    if settings.normalize:
        mu_rows, positive_mean = F.normalize(mu_rows, dim=1), F.normalize(positive_mean, dim=1)
        virtual_mu = None if virtual_mu is None else F.normalize(virtual_mu, dim=2)
    fixed_mu, fixed_var = mu_rows.detach(), var_rows.detach()
    present = positive_variance.isfinite().all(1)
    loss = mu_rows.sum() * 0.0
    for number in range(len(anchor_index)):
        if not present[number] or anchor_index[number, 0] < 0:
            continue
        anchors, negatives = anchor_index[number], negative_index[number]
        candidate_mu = [positive_mean[number].expand(len(anchors), 1, -1), fixed_mu[negatives]]
        candidate_var = [positive_variance[number].expand(len(anchors), 1, -1), fixed_var[negatives]]
        if virtual_mu is not None:
            others = present.clone()
            others[number] = False
            rows = virtual_mu[others].flatten(0, 1).expand(len(anchors), -1, -1)
            candidate_mu.append(rows)
            candidate_var.append(torch.zeros_like(rows))
        scores = score(
            mu_rows[anchors][:, None],
            var_rows[anchors][:, None],
            torch.cat(candidate_mu, dim=1),
            torch.cat(candidate_var, dim=1),
            settings,
        )
        first = torch.zeros(len(anchors), dtype=torch.int64, device=mu.device)
        loss = loss + F.cross_entropy(scores / settings.tau, first)
    return loss / present.sum()


def loop_contrast(
    mu: Tensor,
    var: Tensor,
    label: Tensor,
    valid: Tensor,
    confidence: Tensor,
    num_classes: int,
    num_anchors: int,
    num_negatives: int,
    num_virtual: int,
    settings: Settings = SETTINGS,
) -> Tensor:
    """The whole published contrast of a batch."""
    mean, variance = loop_prototypes(mu, var, label, valid, num_classes)
    probability = negative_classes(mean, variance, settings)
    anchors = loop_anchors(label, valid & (confidence < settings.delta_s), num_classes, num_anchors)
    generator = np.random.default_rng(0)
    negatives = loop_negatives(probability, label, valid, num_anchors, num_negatives, generator)
    virtual_mu = None
    if num_virtual:
        noise = torch.randn(num_classes, num_virtual, mu.shape[1], device=mu.device)
        spread = torch.where(variance.isfinite(), variance, 0.0)
        virtual_mu = mean[:, None] + settings.beta * noise * spread[:, None]
    return loop_loss(mu, var, anchors, negatives, mean, variance, virtual_mu, settings)


def negative_classes(mean: Tensor, variance: Tensor, settings: Settings = SETTINGS) -> Tensor:
    """[C, C]: softmax of the prototypes' scores over tau, over the other classes present."""
    present = variance.isfinite().all(1)
    variance = torch.where(present[:, None], variance, 1.0)
    mean = F.normalize(mean, dim=1) if settings.normalize else mean
    scores = score(mean[:, None], variance[:, None], mean, variance, settings)
    itself = torch.eye(len(mean), dtype=torch.bool, device=mean.device)
    allowed = present[:, None] & present & ~itself
    probability = torch.softmax((scores / settings.tau).masked_fill(~allowed, -torch.inf), dim=1)
    return torch.where(allowed, probability, 0.0)
