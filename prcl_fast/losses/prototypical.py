"""Prototype losses of PPS: pixel contrast, class scores, and the choice of one prototype per class.

Source: Chen and Lian, "Semi-supervised Semantic Segmentation via Prototypical Contrastive Learning" (ACM MM
2022); equation numbers are that paper's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prcl_fast.ops import Purpose, class_lists, philox_normal, sample_anchors, sample_negatives
from prcl_fast.ops.arguments import (
    BOOL,
    FLOATING,
    INTEGER,
    check_count,
    check_seed,
    check_temperature,
    check_tensor,
)

# Score beyond which `odds_logits` follows the tangent of the exponential.
_BOUND = 3.0


class Contrast(NamedTuple):
    """L_contra and its sampling."""

    loss: Tensor  # scalar, float32
    pixels: Tensor  # [K] int32, of each prototype


def prototypical_contrast(
    projection: Tensor,
    prototype: Tensor,
    valid: Tensor,
    num_prototypes: int,
    seed: Tensor,
    *,
    tau: float,
    num_anchors: int,
    num_negatives: int,
    normalize: bool,
) -> Contrast:
    """L_contra, eq. (7): InfoNCE between pixels; pixels of the same prototype are positives.

    For each prototype k, n pixels v_i and r negatives o_j are drawn, with replacement. A negative is drawn in
    two steps: its prototype, uniformly from all other prototypes with pixels, also those of the same class
    (second strategy of section 3.3); then its pixel. The positive v_i' of v_i is the next of the n pixels. A
    term whose two pixels are the same is left out, since i' differs from i. The double sum of eq. (7) is
    taken as the mean over its terms.

    Args:
        projection: F_p [B, D, h, w] floating, of the pixels of both networks.
        prototype: [B, h, w] integer, the prototype of each pixel.
        valid: [B, h, w] bool.
        num_prototypes: K = N_p.
        seed: int64 [2] = (seed, step), on the projection's device.
        tau: temperature.
        num_anchors, num_negatives: n and r.
        normalize: L2-normalise the features, so that v . o is between -1 and 1; the paper does not.
    Returns:
        the loss, a 0 that stays in the graph if there is no term, and the sampling.
    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_tensor("projection", projection, ("B", "D", "h", "w"), FLOATING)
    beside = ("projection", projection)
    check_tensor("prototype", prototype, (len(projection), *projection.shape[2:]), INTEGER, beside)
    check_tensor("valid", valid, prototype.shape, BOOL, beside)
    check_seed(seed, beside)
    check_temperature("tau", tau)
    with torch.no_grad():
        lists = class_lists(prototype, valid, valid, num_prototypes)
        pixels = lists.valid_start.diff()
        anchors = sample_anchors(
            prototype, valid, valid, num_prototypes, num_anchors, seed, lists=lists
        )  # [K, n]
        itself = torch.eye(num_prototypes, dtype=torch.bool, device=pixels.device)
        other = ((pixels > 0) & ~itself).double()
        probability = other / other.sum(1, keepdim=True).clamp(min=1)
        negatives = sample_negatives(
            probability, prototype, valid, num_prototypes, 1, num_negatives, seed, lists=lists
        )[:, 0]  # [K, r]
        counts = (anchors >= 0) & (anchors.roll(-1, 1) != anchors) & (negatives[:, :1] >= 0)
    rows = projection.permute(0, 2, 3, 1).flatten(0, 2)
    v, o = rows[anchors.clamp(min=0)].float(), rows[negatives.clamp(min=0)].float()
    if normalize:
        v, o = F.normalize(v, dim=-1), F.normalize(o, dim=-1)
    with torch.autocast(projection.device.type, enabled=False):
        positive = (v * v.roll(-1, 1)).sum(-1, keepdim=True) / tau  # [K, n, 1]
        scores = torch.cat([positive, v @ o.mT / tau], dim=-1)
        terms = torch.logsumexp(scores, dim=-1) - positive[..., 0]
        loss = torch.where(counts, terms, 0.0).sum() / counts.sum().clamp(min=1)
    return Contrast(loss, pixels)


def odds_logits(score: Tensor) -> Tensor:
    """Logits of the softmax of eq. (9): psi(sigmoid(S)) = e^S for S up to 3, and its tangent beyond.

    psi(t) = t / (1 - t) maps sigmoid(S) to the odds e^S. Computed as printed, the odds are infinite in
    float32 from S = 17 on, and a misclassified pixel has a loss and a gradient of the size of e^S. The
    tangent bounds both and keeps the order of the scores; a clamp would lose order and gradient. A class at S
    = 3 is 19 nats above a class below 0: probability 1 in float32. Between two classes above 3 the tangent is
    softer than the paper: at (4, 3.9) it gives 0.88, e^S gives 0.99.

    Unlike a softmax of S, this one changes if all scores of a pixel shift together: if all S are far below 0,
    all odds are 0, and so is the gradient.

    Args:
        score: S of eq. (8), any shape, floating.
    Returns:
        the same shape, float32 or float64.
    Raises:
        TypeError: `score` is no floating tensor.
    """
    if not isinstance(score, Tensor) or score.dtype not in FLOATING:
        raise TypeError(f"score must be a floating tensor; got {getattr(score, 'dtype', type(score))}")
    score = score if score.dtype == torch.float64 else score.float()
    bounded = score.clamp(max=_BOUND)
    return bounded.exp() * (1 + (score - bounded))


def one_prototype_per_class(scores: list[Tensor], num_classes: int, seed: Tensor) -> list[Tensor]:
    """p_c of eq. (10): the scores of one prototype per class, drawn uniformly, the same for all pixels.

    Args:
        scores: maps P_m [B, C * n, h, w]; all get the same draw.
        num_classes: C.
        seed: int64 [2] = (seed, step), on the scores' device.
    Returns:
        [B, C, h, w] of each, channels_last.
    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_count("num_classes", num_classes)
    for index, score in enumerate(scores):
        check_tensor(f"scores[{index}]", score, ("B", "C * n", "h", "w"), (*FLOATING, *INTEGER))
        if score.shape[1] % num_classes or score.shape[1] != scores[0].shape[1]:
            raise ValueError(
                f"scores[{index}] must have a multiple of {num_classes} channels, the same for each; "
                f"got {list(score.shape)}"
            )
    per_class = scores[0].shape[1] // num_classes
    # Each of n independent, equally distributed numbers is the largest equally often.
    drawn = philox_normal(seed, (num_classes, per_class), Purpose.ACTIVATED_PROTOTYPE).argmax(1)
    number = torch.arange(num_classes, device=drawn.device) * per_class + drawn
    return [score.permute(0, 2, 3, 1).index_select(3, number).permute(0, 3, 1, 2) for score in scores]
