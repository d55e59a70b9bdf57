"""Supervised and unsupervised segmentation losses."""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.ops import upsample_cross_entropy

OMEGA = ("batch", "image")


def supervised_loss(
    logits: Tensor, label: Tensor, *, ignore_index: int = 255, align_corners: bool = True
) -> Tensor:
    """L_s, eq. (13) of the IJCV paper: mean cross-entropy over the labeled pixels, at label size.

    Args:
        logits: [B, C, h, w] floating, upsampled bilinearly to the label's size.
        label: [B, H, W] uint8 or int64, class or `ignore_index`.
    Returns:
        scalar; a 0 that stays in the graph where every pixel is ignored.
    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    return upsample_cross_entropy(logits, label, ignore_index=ignore_index, align_corners=align_corners)


def unsupervised_loss(
    logits: Tensor,
    pseudo_label: Tensor,
    confidence: Tensor,
    delta_u: float,
    *,
    omega: str = "batch",
    ignore_index: int = 255,
    align_corners: bool = True,
) -> Tensor:
    """L_u, eq. (14) of the IJCV paper: omega times the cross-entropy against the pseudo-labels.

    The mean runs over all pixels that are not ignored, the uncertain ones included: they are weighed down by
    omega. omega = "batch" is the paper's: the share, among the batch's pixels that are not ignored, of those
    with p > delta_u. omega = "image" is the authors' public code's: one weight per image, the number of its
    pixels with p >= delta_u, ignored or not, over the number of those not ignored, so that it can exceed one.
    (That code leaves pixels whose loss rounds to exactly 0 out of the mean; here they count.)

    Args:
        logits: [B, C, h, w] floating, upsampled bilinearly to the label's size.
        pseudo_label: [B, H, W] uint8 or int64, class or `ignore_index`.
        confidence: [B, H, W] floating, p.
        delta_u: threshold of the confidence.
        omega: "batch" or "image".
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
        share = (kept & (confidence > delta_u)).sum() / kept.sum().clamp(min=1)
        weight = share.expand(len(logits))
    elif omega == "image":
        weight = (confidence >= delta_u).sum((1, 2)) / kept.sum((1, 2)).clamp(min=1)
    else:
        raise ValueError(f"omega must be one of {', '.join(OMEGA)}; got {omega!r}")
    return upsample_cross_entropy(
        logits,
        pseudo_label,
        weight=weight.to(torch.float32),
        ignore_index=ignore_index,
        align_corners=align_corners,
    )
