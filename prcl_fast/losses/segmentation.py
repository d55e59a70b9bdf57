"""Supervised and unsupervised segmentation losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prcl_fast.ops import upsample_cross_entropy
from prcl_fast.processes.collectives import start_sum, world_size

OMEGA = ("batch", "image", "pixel")


@dataclass(frozen=True)
class PixelCounts:
    """Numbers of pixels in the batch of several processes, each as its mean over the processes.

    A loss over a process's own pixels, divided by these, is such that the mean over the processes is the mean
    over all pixels, however unevenly the labeled ones are spread.
    """

    labeled: Tensor  # scalars, float64; labeled
    pseudo_labeled: Tensor  # unlabeled and not ignored
    confident: Tensor  # of those, with a confidence above delta_u


def start_counting(
    label: Tensor,
    pseudo_label: Tensor | None = None,
    confidence: Tensor | None = None,
    delta_u: float = 0.0,
    *,
    ignore_index: int = 255,
) -> Callable[[], PixelCounts | None]:
    """Starts to add up the processes' counts and returns what waits for them; None with one process.

    Args:
        label: [B, H, W] of the labeled images.
        pseudo_label, confidence: [B, H, W] of the unlabeled ones, if any.
        delta_u: threshold of the confidence.
    """
    if world_size() == 1:
        return lambda: None
    counts = [(label != ignore_index).sum(), label.new_zeros(2, dtype=torch.int64)]
    if pseudo_label is not None and confidence is not None:
        kept = pseudo_label != ignore_index
        counts[1] = torch.stack([kept.sum(), (kept & (confidence > delta_u)).sum()])
    wait = start_sum(torch.cat([counts[0][None], counts[1]]))
    return lambda: PixelCounts(*(wait().double() / world_size()).unbind())


def supervised_loss(
    logits: Tensor,
    label: Tensor,
    *,
    counts: PixelCounts | None = None,
    ignore_index: int = 255,
    align_corners: bool = True,
) -> Tensor:
    """L_s, eq. (13) of the IJCV paper: mean cross-entropy over the labeled pixels, at label size.

    Args:
        logits: [B, C, h, w] floating, upsampled bilinearly to the label's size.
        label: [B, H, W] uint8 or int64, class or `ignore_index`.
        counts: of `start_counting`, where the mean runs over the pixels of several processes.
    Returns:
        scalar; a 0 that stays in the graph where every pixel is ignored.
    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    return _mean(
        logits,
        label,
        None,
        None if counts is None else counts.labeled,
        ignore_index=ignore_index,
        align_corners=align_corners,
    )


def unsupervised_loss(
    logits: Tensor,
    pseudo_label: Tensor,
    confidence: Tensor,
    delta_u: float,
    *,
    omega: str = "batch",
    counts: PixelCounts | None = None,
    ignore_index: int = 255,
    align_corners: bool = True,
) -> Tensor:
    """L_u: the cross-entropy against the pseudo-labels, weighted by how many pixels are confident.

    N counts the pixels that are not ignored. The mean runs over all N, the uncertain ones included, and omega
    says how they are weighted:

    - "batch": IJCV paper, eq. (14): every pixel by omega = N^ / N, the share of the batch's pixels with
      p > delta_u.
    - "pixel": AAAI paper, eq. (11): "we only consider the pixels whose predicted confidence" is above
      delta_u, "and lambda_u is defined as the percentage of them". Their mean, (1 / N^) sum of their losses,
      times lambda_u = N^ / N is (1 / N) sum of their losses: weight 1 with p >= delta_u, 0 for others. It is
      the same whether mean and percentage are each image's or the batch's, if all images have N alike.
      FixMatch [Sohn et al., 2020, eq. (4)] and PCR [Xu et al., 2022, eq. (9)] have this form, and count
      p = delta_u, too.
    - "image": the PRCL authors' public code: every pixel of an image by the number of the image's pixels with
      p >= delta_u, ignored or not, over the number of those not ignored, so that it can exceed one. That code
      leaves pixels whose loss rounds to exactly 0 out of the mean; here they count.

    Args:
        logits: [B, C, h, w] floating, upsampled bilinearly to the label's size.
        pseudo_label: [B, H, W] uint8 or int64, class or `ignore_index`.
        confidence: [B, H, W] floating, p.
        delta_u: threshold of the confidence.
        omega: "batch" (IJCV paper), "pixel" (AAAI paper) or "image" (the authors' public code).
        counts: of `start_counting`, where mean and omega are those of several processes' pixels.
    Returns:
        scalar; a 0 that stays in the graph where every pixel is ignored.
    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if confidence.shape != pseudo_label.shape:
        expected = list(pseudo_label.shape)
        raise ValueError(
            f"confidence must have pseudo_label's shape {expected}; got {list(confidence.shape)}"
        )
    kept = pseudo_label.long() != ignore_index
    if omega == "batch":
        if counts is None:
            share = (kept & (confidence > delta_u)).sum() / kept.sum().clamp(min=1)
        else:
            share = counts.confident / _or_one(counts.pseudo_labeled)
        weight = share.expand(len(logits))
    elif omega == "image":
        weight = (confidence >= delta_u).sum((1, 2)) / kept.sum((1, 2)).clamp(min=1)
    elif omega == "pixel":
        weight = confidence >= delta_u
    else:
        raise ValueError(f"omega must be one of {', '.join(OMEGA)}; got {omega!r}")
    return _mean(
        logits,
        pseudo_label,
        weight.to(torch.float32),
        None if counts is None else counts.pseudo_labeled,
        ignore_index=ignore_index,
        align_corners=align_corners,
    )


def _mean(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    count: Tensor | None,
    *,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    """The weighted loss over `count` pixels; None means: over those that are not ignored here."""
    reduction = "mean" if count is None else "sum"
    loss = upsample_cross_entropy(
        logits,
        target,
        weight=weight,
        ignore_index=ignore_index,
        align_corners=align_corners,
        reduction=reduction,
    )
    return loss if count is None else loss / _or_one(count).to(loss.dtype)


def _or_one(count: Tensor) -> Tensor:
    return torch.where(count > 0, count, 1.0)
