"""Pseudo-labels and their confidence from the teacher's logits, eq. (1) of the IJCV paper."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pseudo_label(logits: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Argmax (uint8) and maximum (float32) of the softmax of the upsampled logits, one image at a time."""
    label = torch.empty(logits.shape[0], height, width, dtype=torch.uint8, device=logits.device)
    confidence = torch.empty(label.shape, dtype=torch.float32, device=logits.device)
    for b in range(logits.shape[0]):
        full = F.interpolate(logits[b : b + 1].float(), (height, width), mode="bilinear", align_corners=True)
        highest, argmax = full.max(dim=1)
        label[b] = argmax[0]
        confidence[b] = torch.exp(highest - full.logsumexp(dim=1))[0]
    return label, confidence
