"""The losses on prototypes of PPS: pixels' contrast, class scores, and a class's prototypes one at a time.

Source: Chen and Lian, "Semi-supervised Semantic Segmentation via Prototypical Contrastive Learning" (ACM MM
2022); equation numbers are that paper's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prcl_fast.ops import Purpose, class_lists, philox_normal, sample_anchors, sample_negatives

# Where `odds_logits` leaves the exponential for its tangent.
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
    """L_contra, eq. (7): InfoNCE between pixels, which belong together where they share a prototype.

    Of each prototype k, n pixels v_i and r negatives o_j are drawn, with replacement. A negative's prototype
    is drawn uniformly from the others that have pixels, those of the same class included (the second strategy
    of section 3.3), then its pixel. The positive v_i' of v_i is the next of the n; where both are the same
    pixel, the term is left out, for i' is not i. The double sum of (7) is taken as the mean over its terms.

    Args:
        projection: F_p [B, D, h, w] floating, of the pixels of both networks.
        prototype: [B, h, w] integer, the prototype of each pixel.
        valid: [B, h, w] bool.
        num_prototypes: K = N_p.
        seed: int64 [2] = (seed, step), on the projection's device.
        tau: temperature.
        num_anchors, num_negatives: n and r.
        normalize: L2-normalise pixels, so that v . o is between -1 and 1; the text does not.
    Returns:
        the loss, a 0 that stays in the graph where no term is left, and the sampling.
    """
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
    """What the softmax of eq. (9) takes: psi(sigmoid(S)) = e^S, for S up to 3 and its tangent beyond.

    psi(t) = t / (1 - t) takes sigmoid(S) back to the odds e^S. Written as in (9) they are infinite in float32
    from S = 17 on, and e^S itself is a wrong pixel's loss and gradient. The tangent keeps both in bounds, and
    the order of the scores, where a clamp would keep neither gradient nor order. A class at 3 beside classes
    below 0 has 19 nats over them, a probability of 1 to float32's precision; between two classes above 3 the
    tangent is softer than the text: at (4, 3.9) it gives 0.88, e^S 0.99.
    Unlike a softmax of S this one is not blind to what all classes have in common: where all S are far below
    0, all odds are 0, and so is the gradient.

    Args:
        score: S of eq. (8), any shape, floating.
    Returns:
        the same shape, float32 or float64.
    """
    score = score if score.dtype == torch.float64 else score.float()
    bounded = score.clamp(max=_BOUND)
    return bounded.exp() * (1 + (score - bounded))


def one_prototype_per_class(scores: list[Tensor], num_classes: int, seed: Tensor) -> list[Tensor]:
    """p_c of eq. (10): the scores of one prototype of each class, drawn uniformly, the same for all pixels.

    Args:
        scores: maps P_m [B, C * n, h, w], all of which get the same draw.
        num_classes: C.
        seed: int64 [2] = (seed, step), on the scores' device.
    Returns:
        [B, C, h, w] of each, channels_last.
    """
    per_class = scores[0].shape[1] // num_classes
    # The largest of n independent numbers of one distribution is each of them equally often.
    drawn = philox_normal(seed, (num_classes, per_class), Purpose.ACTIVATED_PROTOTYPE).argmax(1)
    number = torch.arange(num_classes, device=drawn.device) * per_class + drawn
    return [score.permute(0, 2, 3, 1).index_select(3, number).permute(0, 3, 1, 2) for score in scores]
