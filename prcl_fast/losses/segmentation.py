"""Supervised and unsupervised segmentation losses, L_s and L_u."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prcl_fast.ops import upsample_cross_entropy
from prcl_fast.ops.arguments import FLOATING, check_number, check_tensor
from prcl_fast.processes.collectives import start_sum, world_size

LABEL = (torch.uint8, torch.int64)
OMEGA = ("batch", "image", "pixel")
_IGNORE = 255  # class id of a pixel without a label, as in `upsample_cross_entropy`


@dataclass(frozen=True)
class PixelCounts:
    """Pixel counts of a batch over several processes, each divided by the number of processes.

    Each process divides the sum of its losses by these counts. The mean over the processes is then the mean
    over all pixels, even if the processes have different numbers of labeled pixels.
    """

    labeled: Tensor  # scalars, float64; pixels with a label
    pseudo_labeled: Tensor  # pixels with a pseudo-label
    confident: Tensor  # of those, pixels with a confidence above delta_u


def start_counting(
    label: Tensor,
    pseudo_label: Tensor | None = None,
    confidence: Tensor | None = None,
    delta_u: float = 0.0,
) -> Callable[[], PixelCounts | None]:
    """Starts the all-reduce of the pixel counts; the returned function waits for it. One process: None.

    Args:
        label: [B, H, W], of the labeled images; 255 is ignored.
        pseudo_label, confidence: [B, H, W], of the unlabeled images, if any.
        delta_u: threshold of the confidence.
    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_tensor("label", label, ("B", "H", "W"), LABEL)
    if (pseudo_label is None) != (confidence is None):
        raise TypeError("pseudo_label and confidence must be given together")
    if pseudo_label is not None and confidence is not None:
        _check_pseudo_labels(pseudo_label, confidence)
    if world_size() == 1:
        return lambda: None
    counts = [(label != _IGNORE).sum(), label.new_zeros(2, dtype=torch.int64)]
    if pseudo_label is not None and confidence is not None:
        kept = pseudo_label != _IGNORE
        counts[1] = torch.stack([kept.sum(), (kept & (confidence > delta_u)).sum()])
    wait = start_sum(torch.cat([counts[0][None], counts[1]]))
    return lambda: PixelCounts(*(wait().double() / world_size()).unbind())


def supervised_loss(logits: Tensor, label: Tensor, *, counts: PixelCounts | None = None) -> Tensor:
    """L_s, eq. (13) of the IJCV paper: mean cross-entropy over the labeled pixels, at label size.

    Args:
        logits: [B, C, h, w] floating, upsampled bilinearly to the label's size.
        label: [B, H, W] uint8 or int64, class ids; 255 is ignored.
        counts: from `start_counting`, for the mean over the pixels of several processes.
    Returns:
        scalar; a 0 that stays in the graph if every pixel is ignored.
    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    return _mean(logits, label, None, None if counts is None else counts.labeled)


def unsupervised_loss(
    logits: Tensor,
    pseudo_label: Tensor,
    confidence: Tensor,
    delta_u: float,
    *,
    omega: str = "batch",
    counts: PixelCounts | None = None,
) -> Tensor:
    """L_u: the cross-entropy against the pseudo-labels, weighted by the fraction of confident pixels.

    The mean runs over all N pixels with a pseudo-label, confident or not. N^ of them have p > delta_u. omega
    chooses their weights:

    - "batch", IJCV paper, eq. (14): every pixel has weight omega = N^ / N of the batch.
    - "pixel", AAAI paper, eq. (11): "we only consider the pixels whose predicted confidence" is above
      delta_u, "and lambda_u is defined as the percentage of them". The mean over these pixels times
      lambda_u = N^ / N is 1 / N times the sum of their losses: weight 1 with p >= delta_u, 0 otherwise. Means
      over each image and over the batch agree if all images have the same N. FixMatch (Sohn et al., 2020,
      eq. 4) and PCR (Xu et al., 2022, eq. 9) have this form, and include p = delta_u.
    - "image", the PRCL authors' public code: every pixel of an image has as weight the image's number of
      pixels with p >= delta_u, ignored ones included, over its number of pixels that are not ignored; it can
      exceed 1. That code leaves pixels whose loss rounds to exactly 0 out of the mean; here they count.

    Args:
        logits: [B, C, h, w] floating, upsampled bilinearly to the label's size.
        pseudo_label: [B, H, W] uint8 or int64, class ids; 255 is ignored.
        confidence: [B, H, W] floating, p.
        delta_u: threshold of the confidence.
        omega: "batch" (IJCV paper), "pixel" (AAAI paper) or "image" (the authors' public code).
        counts: from `start_counting`, for mean and omega over the pixels of several processes.
    Returns:
        scalar; a 0 that stays in the graph if every pixel is ignored.
    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check_pseudo_labels(pseudo_label, confidence)
    check_number("delta_u", delta_u, 0.0, 1.0)
    kept = pseudo_label.long() != _IGNORE
    if omega == "batch":
        if counts is None:
            fraction = (kept & (confidence > delta_u)).sum() / kept.sum().clamp(min=1)
        else:
            fraction = counts.confident / _or_one(counts.pseudo_labeled)
        weight = fraction.expand(len(logits))
    elif omega == "image":
        weight = (confidence >= delta_u).sum((1, 2)) / kept.sum((1, 2)).clamp(min=1)
    elif omega == "pixel":
        weight = confidence >= delta_u
    else:
        raise ValueError(f"omega must be one of {', '.join(OMEGA)}; got {omega!r}")
    count = None if counts is None else counts.pseudo_labeled
    return _mean(logits, pseudo_label, weight.to(torch.float32), count)


def _check_pseudo_labels(pseudo_label: Tensor, confidence: Tensor) -> None:
    check_tensor("pseudo_label", pseudo_label, ("B", "H", "W"), LABEL)
    beside = ("pseudo_label", pseudo_label)
    check_tensor("confidence", confidence, pseudo_label.shape, FLOATING, beside)


def _mean(logits: Tensor, target: Tensor, weight: Tensor | None, count: Tensor | None) -> Tensor:
    """The sum of the weighted losses over `count`; None: over the number of pixels that are not ignored."""
    if count is None:
        return upsample_cross_entropy(logits, target, weight=weight, reduction="mean")
    loss = upsample_cross_entropy(logits, target, weight=weight, reduction="sum")
    return loss / _or_one(count).to(loss.dtype)


def _or_one(count: Tensor) -> Tensor:
    return torch.where(count > 0, count, 1.0)
