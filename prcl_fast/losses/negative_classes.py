"""Class distribution of an anchor's real negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.ops import PrototypeStatistics, mutual_likelihood_score


def negative_class_probability(
    prototypes: PrototypeStatistics, tau: float, *, reduction: str, normalize: bool, uniform: bool
) -> Tensor:
    """Softmax of the prototypes' scores over tau, over the other classes present [IJCV, 3.5, strategy 3].

    The paper draws negatives "non-uniformly" by the MLS of the prototypes; the softmax over these scores is
    that of the authors' public code.

    Args:
        prototypes: of C classes; a class with pixels is present.
        tau: temperature.
        reduction, normalize: as in `mutual_likelihood_score`.
        uniform: whether all scores count as equal.
    Returns:
        [C, C]; row c is the distribution of the classes of class c's negatives, zeros if it has none.
    """
    present = prototypes.count > 0
    mean = prototypes.mean
    if uniform:
        score = mean.new_zeros(len(mean), len(mean))
    else:
        variance = torch.where(present[:, None], prototypes.variance, 1.0)
        score = mutual_likelihood_score(
            mean, variance, mean, variance, reduction=reduction, normalize=normalize
        )
    itself = torch.eye(len(mean), dtype=torch.bool, device=mean.device)
    allowed = present[:, None] & present[None, :] & ~itself
    probability = torch.softmax((score / tau).masked_fill(~allowed, -torch.inf), dim=1)
    return torch.where(allowed, probability, 0.0)
