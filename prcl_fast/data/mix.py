"""Mixing of unlabeled images with a partner from the same batch: CutOut, CutMix, ClassMix."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prcl_fast.data.draws import StrongDraws
from prcl_fast.data.source import IGNORE


@torch.no_grad()
def mix(
    image: Tensor,
    label: Tensor,
    confidence: Tensor,
    draws: StrongDraws,
    kind: Literal["none", "cutout", "cutmix", "classmix"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces the same region of every image, of its pseudo-label and of its confidence.

    - cutout erases a box: the image's mean colour, label 255, confidence 0.
    - cutmix pastes a box of the partner [French et al., BMVC 2020].
    - classmix pastes the partner's pixels of half of the classes present in it, rounded up [Olsson et al.,
      WACV 2021]; 255 is no class and is never pasted.

    Every other pixel of the result is the image's, unchanged. Shapes do not depend on values, and nothing is
    read back to the host.

    Args:
        image: [B, 3, h, w] floating point.
        label: [B, h, w] uint8.
        confidence: [B, h, w] floating point.
        draws: for B images of h x w pixels.
    """
    if kind == "none":
        return image, label, confidence
    if kind == "cutout":
        box = _in_box(draws.box, label.shape[1], label.shape[2])
        mean_color = image.mean(dim=(2, 3), keepdim=True)
        return (
            torch.where(box[:, None], mean_color, image),
            label.masked_fill(box, IGNORE),
            confidence.masked_fill(box, 0.0),
        )
    partner_label = label[draws.partner]
    if kind == "cutmix":
        pasted = _in_box(draws.box, label.shape[1], label.shape[2])
    else:
        pasted = _in_half_of_the_classes(partner_label, draws.class_score)
    return (
        torch.where(pasted[:, None], image[draws.partner], image),
        torch.where(pasted, partner_label, label),
        torch.where(pasted, confidence[draws.partner], confidence),
    )


def _in_box(box: Tensor, height: int, width: int) -> Tensor:
    """[B, 4] -> [B, h, w] bool."""
    top, bottom, left, right = box[:, :, None].unbind(dim=1)
    row = torch.arange(height, device=box.device)
    column = torch.arange(width, device=box.device)
    return ((row >= top) & (row < bottom))[:, :, None] & ((column >= left) & (column < right))[:, None, :]


def _in_half_of_the_classes(label: Tensor, score: Tensor) -> Tensor:
    """Mask [B, h, w] of the pixels whose class is in the half of the image's classes with lowest score."""
    flat = label.flatten(1).long()
    present = torch.zeros_like(score, dtype=torch.bool).scatter_(1, flat, True)
    present[:, IGNORE] = False
    rank = score.masked_fill(~present, 2.0).argsort(dim=1, stable=True).argsort(dim=1)
    half = (present.sum(dim=1, keepdim=True) + 1) // 2
    taken = present & (rank < half)
    return taken.gather(1, flat).view(label.shape)
