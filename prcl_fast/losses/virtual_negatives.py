"""Virtual negatives drawn from global prototypes, and the spread of a class's means."""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.ops import ClassLists, PrototypeStatistics, Purpose, philox_normal, sample_anchors

# Pixels of each class from which one step estimates the spread of its means.
_PIXELS = 64
# Keeps their draws apart from the anchors' draws of the same step.
_SPREAD = 0x53505244


def draw_virtual_negatives(
    prototypes: PrototypeStatistics, number: int, beta: float, seed: Tensor, spread: Tensor
) -> Tensor:
    """Draws from the prototypes' distributions, IJCV eq. (10): mu_c + beta * eps * s_c, eps ~ N(0, I).

    The paper prints the prototype's variance for s_c. A class without pixels has a spread of 0.

    Args:
        prototypes: of C classes, D dimensions.
        number: V, per class.
        beta: virtual radius.
        seed: int64 [2] = (seed, step), on the prototypes' device.
        spread: s, [C, D].
    Returns:
        [C, V, D], dtype of the prototypes' means.
    """
    mean = prototypes.mean[:, None]
    spread = torch.where(prototypes.count[:, None] > 0, spread, 0.0)
    noise = philox_normal(seed, (mean.shape[0], number, mean.shape[2]), Purpose.VIRTUAL_NEGATIVES)
    return mean + beta * noise * spread[:, None]


def moments_of_means(
    mu: Tensor, label: Tensor, valid: Tensor, num_classes: int, seed: Tensor, lists: ClassLists
) -> Tensor:
    """Sums, sums of squares and number of each class's mu, at 64 pixels drawn from its valid ones.

    Args:
        mu: [B, D, h, w] floating.
        label: [B, h, w] integer; values outside 0 .. C-1 are no class.
        valid: [B, h, w] bool.
        num_classes: C.
        seed: int64 [2] = (seed, step).
        lists: `class_lists` of the same label and valid.
    Returns:
        [C, 2D + 1] float32.
    """
    index = sample_anchors(
        label, valid, valid, num_classes, _PIXELS, seed ^ _SPREAD, lists=lists.with_all_hard()
    )
    drawn = (index >= 0)[..., None]
    rows = mu.permute(0, 2, 3, 1).reshape(-1, mu.shape[1])[index.clamp(min=0)].float()  # [C, 64, D]
    rows = torch.where(drawn, rows, 0.0)
    return torch.cat([rows.sum(1), rows.square().sum(1), drawn.float().sum(1)], dim=1)


def variance_of_means(moments: Tensor) -> Tensor:
    """[C, 2D + 1] of `moments_of_means` -> [C, D] variances; 0 for a class without pixels."""
    dim = moments.shape[1] // 2
    total, squares, count = moments.split([dim, dim, 1], dim=1)
    count = count.clamp(min=1)
    return (squares / count - (total / count).square()).clamp(min=0.0)
